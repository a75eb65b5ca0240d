"""The last changes of a node's own tiers, in order and numbered, for whoever reads at his own pace.

Bounded: who is too slow is told that something is missing, and the node waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from kvstrata.errors import UsageError
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.spares import Name

MOST_CHANGES = 1 << 16
MOST_WAITING = 64


class Change(NamedTuple):
    """An object has entered a tier, or left it for a cause; without a key the tier was emptied."""

    tier: str
    key: bytes
    part: int
    cause: Cause | None


class Read(NamedTuple):
    """What there was to read.

    Args:
        changes: in order.
        next: number of the change after them.
        lost: whether changes before these are missing.
    """

    changes: list[Change]
    next: int
    lost: bool


class Journal:
    """A `kvstrata.node.common.changes.Watcher` that remembers; lives on the node's loop.

    Args:
        most: changes that are remembered.
    """

    def __init__(self, most: int = MOST_CHANGES) -> None:
        self.next = 0
        """Number of the next change."""
        self._most = most
        self._ring: list[Change] = []
        self._waiting: set[asyncio.Future[None]] = set()

    def entered(self, tier: str, key: bytes, part: int) -> None:
        """See `Watcher`."""
        self._note(Change(tier, key, part, None))

    def found(self, tier: str, names: Sequence[Name]) -> None:
        """See `Watcher`."""
        for name in names:
            self.entered(tier, *name)

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        """See `Watcher`."""
        self._note(Change(tier, key, part, cause))

    def emptied(self, tier: str) -> None:
        """See `Watcher`."""
        self._note(Change(tier, b"", 0, Cause.CLEARED))

    def read(self, since: int, most: int) -> Read:
        """Changes from number ``since`` on, ``most`` of them at most."""
        oldest = max(0, self.next - self._most)
        lost = not oldest <= since <= self.next
        begin = oldest if lost else since
        end = min(self.next, begin + most)
        ring, size = self._ring, self._most
        return Read([ring[number % size] for number in range(begin, end)], end, lost)

    async def wait(self, since: int, timeout_s: float) -> None:
        """Return when there is a change of number ``since``, or the time is over.

        Raises:
            UsageError: too many wait already.
        """
        if self.next > since:
            return
        if len(self._waiting) >= MOST_WAITING:
            raise UsageError(f"{MOST_WAITING} wait for changes already")
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait({future}, timeout=timeout_s)
        finally:
            self._waiting.discard(future)

    def _note(self, change: Change) -> None:
        if len(self._ring) < self._most:
            self._ring.append(change)
        else:
            self._ring[self.next % self._most] = change
        self.next += 1
        while self._waiting:
            future = self._waiting.pop()
            if not future.done():
                future.set_result(None)
