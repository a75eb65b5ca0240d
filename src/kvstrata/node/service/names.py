"""What a shared store knows objects by: ``docs/format.md`` has the page.

A name says more than an object's id: the epoch, so that a clear is exact for all; the namespace, so
that a model's objects can be told from others'; and the byte order, so that engines of several
kinds, which cannot read each other's native bytes, neither miss nor overwrite each other's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from blake3 import blake3

from kvstrata.parts import at_level, identity
from kvstrata.tiers.epochs import epoch_prefix

TAG_BYTES = 8
MAX_SEEN = 1024

_TAG_CONTEXT = b"kvstrata name 1 "


class Where(NamedTuple):
    """All of an object's name but its id.

    Args:
        epoch: number of the epoch.
        namespace: what the object belongs to, 32 bytes.
        order: the name of its byte order, see `kvstrata.parts.order_name`.
    """

    epoch: int
    namespace: bytes
    order: str

    def name(self, key: bytes, part: int) -> bytes:
        """Of one object there, 60 bytes."""
        return _beginning(*self) + identity(key, part)


@functools.lru_cache(maxsize=256)
def _beginning(epoch: int, namespace: bytes, order: str) -> bytes:
    tag = blake3(_TAG_CONTEXT + order.encode()).digest(TAG_BYTES)
    return epoch_prefix(epoch) + namespace[:TAG_BYTES] + tag


class Seen:
    """Which namespaces, byte orders and parts this node has met, for whoever has a key alone."""

    def __init__(self) -> None:
        self._met: dict[tuple[bytes, str, int], None] = {}

    def note(self, namespace: bytes, orders: Iterable[str], parts: Iterable[int]) -> None:
        """These are in use; of very many the first ones are forgotten."""
        for met in itertools.product([namespace], orders, parts):
            self._met[met] = None
        while len(self._met) > MAX_SEEN:
            del self._met[next(iter(self._met))]

    def names(self, epoch: int, keys: Iterable[bytes], num_levels: int) -> Iterator[bytes]:
        """All that objects of these chunks may be called, their coarser copies included."""
        for key in keys:
            for namespace, order, part in self._met:
                where = Where(epoch, namespace, order)
                for level in range(num_levels):
                    yield where.name(key, at_level(part, level))
