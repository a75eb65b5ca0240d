"""The node: one process a machine that owns the pool, the index and all tiers."""
