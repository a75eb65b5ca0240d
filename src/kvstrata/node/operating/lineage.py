"""What chunks descend from: read out of the headers that pass through host memory.

An index knows keys, sizes and owners. Parent and position stand in the header, and every chunk that
an engine stores or loads has its header in host memory for a while. What was read there is
remembered for the last chunks, however long they stay in any tier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstrata.node.common.changes import Cause
from kvstrata.node.common.spares import Name
from kvstrata.node.slots.host import HostMemory
from kvstrata.objects import HEADER_BYTES, Kinship, kinship
from kvstrata.tables import Queue

MAX_KNOWN = 1 << 16
"""Chunks of which it is remembered: about 20 MB at most."""

NOTHING = Kinship(b"", 0, 0)


class _Known(NamedTuple):
    kinship: Kinship
    used: float


class Lineage:
    """Watches host memory; see `kvstrata.node.common.changes.Watcher`.

    Args:
        host: host memory.
        now: Unix seconds.
    """

    def __init__(self, host: HostMemory, now: Callable[[], float] = time.time) -> None:
        self._host = host
        self._now = now
        self._known: Queue[_Known] = Queue()

    def __len__(self) -> int:
        return len(self._known)

    def of(self, key: bytes) -> tuple[Kinship, float]:
        """Its kinship, and when it came or a match last ended with it (Unix time; 0: unknown)."""
        known = self._known.get(key)
        return (NOTHING, 0.0) if known is None else known

    def used(self, key: bytes) -> None:
        """A match has ended with this chunk: it and all before it were used."""
        if (known := self._known.pop(key)) is not None:
            self._known[key] = known._replace(used=self._now())

    def entered(self, tier: str, key: bytes, part: int) -> None:
        """See `Watcher`."""
        if tier != "host" or key in self._known:
            return
        slot = self._host.get(key, part)
        assert slot is not None
        found = kinship(self._host.pool.view(slot.offset, HEADER_BYTES))
        self._known[key] = _Known(found, self._now())
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def found(self, tier: str, names: Sequence[Name]) -> None:
        """See `Watcher`. Their headers are not in host memory."""

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        """See `Watcher`. What a chunk descends from stays true."""

    def emptied(self, tier: str) -> None:
        """See `Watcher`."""
