"""The process reward model, what it selects, and what is measured of responses."""
