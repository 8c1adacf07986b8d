"""The policies: shared layers, the vision tower, and one file per model family."""
