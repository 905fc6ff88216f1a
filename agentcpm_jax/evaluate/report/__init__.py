"""Pages for people: the report of a run, and why an issue was trained as it was."""
