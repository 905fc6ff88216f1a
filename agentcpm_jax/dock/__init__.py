"""The tools of an agent: the protocol of their calls and answers."""
