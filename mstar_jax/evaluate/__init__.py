"""Benchmarks: `python -m mstar_jax.evaluate`."""
