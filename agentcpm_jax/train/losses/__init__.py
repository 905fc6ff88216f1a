"""Policy losses as pure functions, each with its equation."""
