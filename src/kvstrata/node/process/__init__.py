"""Ways to have a node: behind a socket, as a process, inside this one."""
