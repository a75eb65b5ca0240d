"""An object on its way into a slower tier, and what became of one on its way out."""

from __future__ import annotations

from typing import NamedTuple

from kvstrata.header import ObjectHeader
from kvstrata.node.service.turns import Name
from kvstrata.tiers.base import Outcome


class Writing:
    """A write under way, and the bytes set aside for it; not wanted once its chunk is cleared.

    Args:
        key: of the chunk.
        replaces: whether it takes the place of what a shared store has by its name.
    """

    __slots__ = ("claimed", "key", "name", "replaces", "wanted")

    def __init__(self, key: bytes, *, replaces: bool = False) -> None:
        self.key = key
        self.replaces = replaces
        self.name: Name | None = None  # of the object whose turn it waits for, or has
        self.claimed = 0
        self.wanted = True


class Read(NamedTuple):
    """What became of a read: with HIT the object's header as it is raw, and its size as stored.

    ``restoring_s`` is what it took to verify, decrypt and decode it, where that was done.
    """

    outcome: Outcome
    header: ObjectHeader | None = None
    nbytes: int = 0
    restoring_s: float = 0.0
