"""Engines: each connector knows its engine and the core, and the core knows none of them."""
