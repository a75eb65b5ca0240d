"""The operator's API: a process of its own, a plain client of the node."""
