"""Host memory: the pool that processes share, and how much of it the machine can give."""
