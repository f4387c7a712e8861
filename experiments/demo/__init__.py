"""A whole run that needs nothing but this repository and one small model; see `__main__`."""
