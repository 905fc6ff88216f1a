"""Qwen3 as pure functions on nested dicts."""
