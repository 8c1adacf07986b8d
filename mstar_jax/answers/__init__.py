"""Whether an answer is right: text only, no jax."""
