"""Images to crops of 8 bits, for each family: what a process that decodes images needs, without jax."""
