"""What is settled before a stage runs, without jax: signals, the job, owner, limits, resuming."""
