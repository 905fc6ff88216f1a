"""The arithmetic of merge methods, in numpy and in jax."""
