"""Looking into the workdir of a run."""
