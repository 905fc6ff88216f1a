"""Attention: the reference and its faster equals."""
