"""`minference compare`: methods and budgets on one model, quality against density."""
