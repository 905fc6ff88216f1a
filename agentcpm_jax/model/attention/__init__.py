"""Attention: the reference, and faster kernels that equal it."""
