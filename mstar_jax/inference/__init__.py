"""Policies that answer and reward models that score."""
