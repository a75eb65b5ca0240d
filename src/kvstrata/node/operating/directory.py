"""The keys of what the node's own tiers hold, in order, so that they can be listed in pages.

A page begins behind a key, not at a number: what comes or goes between two pages moves nothing, so
a chunk that stays is told once, neither twice nor not at all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvstrata.node.common.changes import Cause
from kvstrata.node.common.spares import Name

BUCKET_BITS = 12
"""Keys are digests, so each of so many buckets has its share; to enter one moves only those there.
At a million chunks a tier pays 9 bytes a chunk."""


class _Keys:
    """The keys of one tier."""

    def __init__(self) -> None:
        self.buckets: dict[int, list[bytes]] = {}
        self._unsorted: set[int] = set()

    def add(self, key: bytes) -> None:
        bucket = self.buckets.setdefault(_bucket(key), self._sorted(_bucket(key)))
        place = bisect_right(bucket, key)
        if not place or bucket[place - 1] != key:
            bucket.insert(place, key)

    def add_all(self, keys: Sequence[bytes]) -> None:
        """At less cost for each; whoever comes to a bucket next has it sorted."""
        numbers = np.frombuffer(b"".join(keys), ">u2")[:: 32 // 2] >> 16 - BUCKET_BITS
        for number, key in zip(numbers.tolist(), keys, strict=True):
            self.buckets.setdefault(number, []).append(key)
            self._unsorted.add(number)

    def discard(self, key: bytes) -> None:
        bucket = self._sorted(_bucket(key))
        place = bisect_right(bucket, key)
        if place and bucket[place - 1] == key:
            del bucket[place - 1]

    def after(self, key: bytes) -> Iterator[bytes]:
        first = _bucket(key) if key else 0
        for number in range(first, 1 << BUCKET_BITS):
            if bucket := self._sorted(number):
                yield from bucket[bisect_right(bucket, key) if number == first else 0 :]

    def _sorted(self, number: int) -> list[bytes]:
        bucket = self.buckets.get(number, [])
        if number in self._unsorted:
            self._unsorted.discard(number)
            bucket[:] = sorted(set(bucket))
        return bucket


class Directory:
    """Watches a node's own tiers; see `kvstrata.node.common.changes.Watcher`.

    Args:
        holds: whether a tier holds anything of a chunk, for each tier's name.
    """

    def __init__(self, holds: dict[str, Callable[[bytes], bool]]) -> None:
        self._holds = holds
        self._tiers = {name: _Keys() for name in holds}
        self._leaving: list[_Keys] = []  # what was emptied, let go of bucket by bucket

    def entered(self, tier: str, key: bytes, part: int) -> None:
        """See `Watcher`."""
        self._tiers[tier].add(key)
        if self._leaving:
            self._let_go()

    def found(self, tier: str, names: Sequence[Name]) -> None:
        """See `Watcher`."""
        self._tiers[tier].add_all([key for key, _ in names])

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        """See `Watcher`."""
        if not self._holds[tier](key):
            self._tiers[tier].discard(key)

    def emptied(self, tier: str) -> None:
        """See `Watcher`. In no time, however many there were."""
        self._leaving.append(self._tiers[tier])
        self._tiers[tier] = _Keys()

    def after(self, tiers: list[str], key: bytes, most: int) -> list[bytes]:
        """The next keys behind one (empty: from the first on) in any of these tiers, in order."""
        self._let_go()
        found: set[bytes] = set()
        for name in tiers:
            for number, one in enumerate(self._tiers[name].after(key)):
                if number == most:
                    break
                found.add(one)
        return sorted(found)[:most]

    def _let_go(self) -> None:
        if self._leaving and self._leaving[-1].buckets:
            self._leaving[-1].buckets.popitem()
        elif self._leaving:
            self._leaving.pop()


def _bucket(key: bytes) -> int:
    return int.from_bytes(key[:2], "big") >> 16 - BUCKET_BITS
