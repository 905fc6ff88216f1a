"""Grading, denoising and advantages of groups."""
