"""What lies in an owned tier, against what is known of it."""

from __future__ import annotations

from kvstrata.node.common.index import Index
from kvstrata.node.service.entries import size_of
from kvstrata.node.service.removals import Removals
from kvstrata.parts import named
from kvstrata.tiers.base import OwnedTier


def check_contents(tier: OwnedTier, index: Index[int], removals: Removals) -> None:
    """Raise AssertionError unless all that a tier holds is known, and counts; blocks for a scan."""
    held = 0
    for batch in tier.scan():
        for found in batch:
            name = named(found.object_id)
            entry, doomed = index.get(*name), name in removals
            assert doomed or entry is not None, f"{found} is in the tier and nowhere else"
            assert doomed or size_of(entry or 0) == found.nbytes, f"{found} has another size"
            held += found.nbytes
    assert held <= index.used_bytes, f"{held} bytes held, {index.used_bytes} counted"
