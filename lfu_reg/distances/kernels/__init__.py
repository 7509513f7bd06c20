"""Fused kernels; every one has a pure-torch twin with the same signature."""
