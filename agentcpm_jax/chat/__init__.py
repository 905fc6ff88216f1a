"""Conversations as token ids, and calls read back from text."""
