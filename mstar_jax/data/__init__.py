"""Readers, prompts and the input pipeline."""
