"""What programs would cost on a machine: `python -m mstar_jax.plan`."""
