"""The tools of an agent: what they are called with and answer."""
