"""What comes into a node's own tiers and what leaves them, and why: told to whoever watches."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from kvstrata.node.common.spares import Name


class Cause(str, Enum):
    """Why something left a tier.

    ``EVICTED``: for something else. ``CLEARED``: somebody asked for it. ``CORRUPT``: its bytes were
    not what had been stored. ``LOST``: the tier does not have it, or failed at it. ``SPENT``: a
    coarser copy that served those who waited for it. ``MOVED``: an operator had it moved to another
    tier, where it is now.
    """

    EVICTED = "evicted"
    CLEARED = "cleared"
    CORRUPT = "corrupt"
    LOST = "lost"
    SPENT = "spent"
    MOVED = "moved"


class Watcher(Protocol):
    """Hears of every change, on the node's loop and as it is made; returns at once.

    A chunk's object that is replaced has entered again.
    """

    def entered(self, tier: str, key: bytes, part: int) -> None:
        """An object of a chunk can be found in a tier."""

    def found(self, tier: str, names: Sequence[Name]) -> None:
        """So can these, by chunk and part, which a scan of a slower tier has found."""

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        """It cannot any more."""

    def emptied(self, tier: str) -> None:
        """Nothing that was in a tier can be found there any more: it was cleared."""


class Changes:
    """Those who watch a node's own tiers."""

    def __init__(self) -> None:
        self._watchers: tuple[Watcher, ...] = ()

    def watch(self, watcher: Watcher) -> None:
        """Tell of every change from now on."""
        self._watchers += (watcher,)

    def entered(self, tier: str, key: bytes, part: int) -> None:
        """See `Watcher`."""
        for one in self._watchers:
            one.entered(tier, key, part)

    def found(self, tier: str, names: Sequence[Name]) -> None:
        """See `Watcher`."""
        for one in self._watchers:
            one.found(tier, names)

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        """See `Watcher`."""
        for one in self._watchers:
            one.left(tier, key, part, cause)

    def emptied(self, tier: str) -> None:
        """See `Watcher`."""
        for one in self._watchers:
            one.emptied(tier)
