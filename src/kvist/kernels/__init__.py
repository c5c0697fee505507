"""Arithmetic on plain tensors; knows nothing above it."""
