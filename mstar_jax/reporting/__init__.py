"""What the report is made of: a run's numbers, figures, sampled responses, and the page's template."""
