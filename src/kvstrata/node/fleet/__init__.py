"""A node as a member of its fleet: what it says of itself, and what it is told."""
