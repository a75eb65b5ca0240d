"""The tier in an object store or a shared folder: its client, its sweep, and who may sweep."""
