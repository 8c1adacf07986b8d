"""The report: `python -m mstar_jax.report`."""
