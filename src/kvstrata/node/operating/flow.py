"""Counts what comes into the node's own tiers and leaves them."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.node.common.changes import Cause
from kvstrata.node.common.spares import Name
from kvstrata.observe.counters import Counters


class Flow:
    """A `kvstrata.node.common.changes.Watcher` that counts.

    Args:
        counters: the node's.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def entered(self, tier: str, key: bytes, part: int) -> None:
        """An object came."""
        self._counters.add("entered_objects_total", tier=tier)

    def found(self, tier: str, names: Sequence[Name]) -> None:
        """These came."""
        self._counters.add("entered_objects_total", len(names), tier=tier)

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        """An object left."""
        self._counters.add("left_objects_total", tier=tier, cause=cause.value)

    def emptied(self, tier: str) -> None:
        """All left at once."""
        self._counters.add("tier_clears_total", tier=tier)
