"""SGLang servers that sample for the trainer."""
