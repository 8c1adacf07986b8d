"""mstar_jax: self-evolving training of multimodal reasoning models (M-STaR) in JAX."""

import os

__version__ = "0.1.0"

# transformers reads tokenizers and configs here, and would warn that it cannot build models without PyTorch
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
