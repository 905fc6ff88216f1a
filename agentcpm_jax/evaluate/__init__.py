"""Scores of models with their uncertainty, and the report."""
