"""Is an answer right: pure text, without jax."""
