"""The verbs of the algorithm."""
