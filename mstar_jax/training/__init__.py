"""Losses, optimizer, checkpoints and curves."""
