"""Hugging Face directories: the only code that reads and writes them."""
