"""`minference search`: the pattern and the budget of every head of a model."""
