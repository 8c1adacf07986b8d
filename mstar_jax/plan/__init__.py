"""What programs would cost: `python -m mstar_jax.plan`."""
