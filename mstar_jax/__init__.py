"""mstar_jax: self-evolving training of multimodal reasoning models (M-STaR) in JAX."""

__version__ = "0.1.0"
