"""What a tier is: a place for whole objects, with a few batched verbs and three outcomes.

A tier stores bytes and says what became of each request. It decides nothing: promotion,
demotion, eviction, byte budgets, verification and deadlines are the node's, once for all tiers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple


class Outcome(Enum):
    """What became of one object of a batch.

    ``HIT``: done; it was there (read, contains, delete) or it is there now (write).
    ``MISS``: it was not there. ``FAILED``: the tier could not tell or could not do it.
    """

    HIT = "hit"
    MISS = "miss"
    FAILED = "failed"


class Found(NamedTuple):
    """One object that a scan found: id, size with header in bytes, last use (Unix seconds)."""

    object_id: bytes
    nbytes: int
    last_used: float


class Tier(ABC):
    """A store of objects, each ``nbytes`` long: a 4096-byte header page, then the padded payload.

    Verbs are batched, answer one outcome per id in order, and block; the node calls them in
    threads, several at once, so an implementation is thread-safe. The caller owns every buffer
    and keeps it still until the call returns; buffers are aligned to 4096 bytes. A batch raises
    `TierUnavailable` (or `TierFull`, from ``write``) only when the tier as a whole cannot be
    used; what concerns one object is that object's outcome.
    """

    name: str

    @property
    def epoch(self) -> int:
        """Number of clears this tier has seen; it outlives the process where the bytes do."""
        return 0

    @property
    def read_only_reason(self) -> str:
        """Why this tier takes no writes at all, ever; empty where it does."""
        return ""

    @abstractmethod
    def contains(self, ids: Sequence[bytes]) -> list[Outcome]:
        """Whether each object is stored, without reading it."""

    @abstractmethod
    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[Outcome]:
        """Read each whole object into its buffer, whose length is the object's ``nbytes``.

        The bytes are not verified here. After MISS or FAILED the buffer holds anything.
        """

    @abstractmethod
    def write(self, objects: Sequence[tuple[bytes, memoryview]]) -> list[Outcome]:
        """Store each object whole or not at all, replacing an older one of the same id."""

    @abstractmethod
    def delete(self, ids: Sequence[bytes]) -> list[Outcome]:
        """Remove each object; HIT where there was one."""

    @abstractmethod
    def scan(self) -> Iterator[list[Found]]:
        """Everything stored, in batches, least recently used first."""

    @abstractmethod
    def clear(self) -> None:
        """Make everything stored so far vanish at once, also for a later process."""

    def reject(self, ids: Sequence[bytes]) -> list[Outcome]:
        """Take corrupt objects out of service, so that they can be stored again."""
        return self.delete(ids)

    def touch(self, ids: Sequence[bytes]) -> None:  # noqa: B027 - optional for a tier
        """Note that these were used, for the order of a later scan. Best effort."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; repeatable, and never raises."""
