"""Speed of a run, and the cost of its computation."""
