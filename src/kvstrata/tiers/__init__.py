"""Places where objects live; one tier a file."""
