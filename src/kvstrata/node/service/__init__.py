"""Slower tiers at work: their calls, their contents, and what moves to them and back."""
