"""A seeded offline web with questions about it."""
