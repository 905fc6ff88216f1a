"""Trajectories and demonstrations become rows, rows become batches."""
