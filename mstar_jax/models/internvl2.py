"""To be written."""

from mstar_jax.models import hf

FAMILY: hf.Family = None  # type: ignore
