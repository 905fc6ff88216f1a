"""Versions of the weights on their way to the engines."""
