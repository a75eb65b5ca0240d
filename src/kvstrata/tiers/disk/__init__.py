"""The tier on local disk: its files, its folder, and the walk over it."""
