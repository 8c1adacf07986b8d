"""Speed and what computation costs."""
