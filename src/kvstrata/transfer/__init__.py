"""Bytes between machines: what two nodes say to each other, and how."""
