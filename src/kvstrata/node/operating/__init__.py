"""What operators ask of a node: one idea a file."""
