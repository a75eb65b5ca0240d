"""Real servers under test, one kind a file; each needs its program on the machine."""
