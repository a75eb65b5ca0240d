"""What a tier is: a place for whole objects, with a few batched verbs and three outcomes.

A store keeps bytes and says what became of each request. It decides nothing: promotion, eviction,
byte budgets, verification and deadlines are the node's, once for all. An `OwnedTier` belongs to one
node, which therefore knows what it holds. A `SharedTier` is a fleet's, and has to be asked.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvstrata.objects import HEADER_BYTES
from kvstrata.tiers.journal import Journal
from kvstrata.tiers.marks import Mark


class Outcome(Enum):
    """What became of one object of a batch.

    ``HIT``: done. ``MISS``: there was nothing to do it to; of a write with ``if_absent``: there is
    one already, and it stays. ``FAILED``: the store could not tell or could not do it.
    """

    HIT = "hit"
    MISS = "miss"
    FAILED = "failed"


class Stat(NamedTuple):
    """What a store knows of an object without reading it.

    Args:
        nbytes: its whole size, header page and padding included.
        order: the name of its byte order; empty where the store does not know.
        version: differs from that of every other object that had this id; empty likewise.
    """

    nbytes: int
    order: str = ""
    version: str = ""


class Found(NamedTuple):
    """One object that a scan found: id, size with header in bytes, last use (Unix seconds)."""

    object_id: bytes
    nbytes: int
    last_used: float


class Put(NamedTuple):
    """One object to be written: ``header_page`` is 4096 bytes, ``payload`` is padded to pages.

    The two are apart, so that each store can have its own header on a payload that it shares with
    others. With ``if_absent`` an object that is there already stays.
    """

    object_id: bytes
    header_page: memoryview
    payload: memoryview
    if_absent: bool = False

    @property
    def nbytes(self) -> int:
        """The object's whole size."""
        return len(self.header_page) + len(self.payload)


@dataclass(frozen=True)
class Limits:
    """What a store can bear; the node keeps to it.

    Args:
        batch_objects: objects of one call, at most.
        batch_bytes: bytes of one call, at most; an object that is larger cannot be stored.
        concurrency: calls at once, at most.
        timeout_s: every call returns within it, by failing if it must; `inf`: no such promise.
        round_objects: ids that ``stat`` tells of in the time of one round trip; of a store that
            takes many in one message, all that a batch may have.
    """

    batch_objects: int = 256
    batch_bytes: int = 1 << 40
    concurrency: int = 64
    timeout_s: float = math.inf
    round_objects: int = 1 << 30


class Store(ABC):
    """A place for whole objects: a 4096-byte header page each, then the padded payload.

    Verbs are batched, answer one outcome per id in order, and block; the node calls them in
    threads, several at once, so an implementation is thread-safe. The caller owns every buffer
    and keeps it still until the call returns; buffers are aligned to 4096 bytes. A batch raises
    `TierUnavailable` (or `TierFull`, from ``write``; or `ReadOnly`, from whatever would change
    something that this node may not) only when the store as a whole cannot be used; what concerns
    one object is that object's outcome.
    """

    name: str
    limits = Limits()

    @abstractmethod
    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        """What is known of each object, or MISS or FAILED."""

    @abstractmethod
    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        """Read each whole object into its buffer; the object's size, or MISS or FAILED.

        A buffer may be larger than the object; one that is smaller is FAILED. The bytes are not
        verified here; a store through whose hands they pass anyway may say what their checksum is,
        by a size that is a `kvstrata.brought.Brought`. After MISS or FAILED the buffer holds
        anything.
        """

    @abstractmethod
    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        """Store each object whole or not at all, replacing an older one of the same id."""

    @abstractmethod
    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        """Remove each object; HIT where there was one.

        Args:
            ids: of the objects.
            versions: as `stat` said; an object of another version stays, and is a MISS. An empty
                one means whatever is there.
        """

    def bind(self, pool: memoryview) -> None:  # noqa: B027 - most have nothing to do
        """Be told where most objects will be read from and written to, for as long as it is open.

        For a store that has to get memory ready first; every buffer may still lie elsewhere.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything; repeatable, and never raises."""


class OwnedTier(Store):
    """A store that one node alone writes to: what is there, how long, and in what order of use."""

    @property
    def epoch(self) -> int:
        """Number of clears this tier has seen; it outlives the process where the bytes do."""
        return 0

    @property
    def read_only_reason(self) -> str:
        """Why this tier takes no writes at all, ever; empty where it does."""
        return ""

    @abstractmethod
    def scan(self) -> Iterator[list[Found]]:
        """Everything stored, in batches, least recently used first."""

    @abstractmethod
    def clear(self) -> None:
        """Make everything stored so far vanish at once, also for a later process."""

    def headers(self, ids: Sequence[bytes]) -> list[bytes | Outcome]:
        """The header page of each object, or MISS or FAILED; not verified here.

        Worth having for less than a read of the whole, as here, where objects outlive the process:
        a node asks for many after a restart.
        """
        return [self._header_of(*one) for one in zip(ids, self.stat(ids), strict=True)]

    def _header_of(self, object_id: bytes, stat: Stat | Outcome) -> bytes | Outcome:
        if isinstance(stat, Outcome):
            return stat
        whole = memoryview(mmap.mmap(-1, stat.nbytes))
        (answer,) = self.read([object_id], [whole])
        return answer if isinstance(answer, Outcome) else bytes(whole[:HEADER_BYTES])

    def reject(self, ids: Sequence[bytes]) -> list[Outcome]:
        """Take corrupt objects out of service, so that they can be stored again."""
        return self.delete(ids)

    def touch(self, ids: Sequence[bytes]) -> None:
        """Note that these were used, for the order of a later scan. Best effort."""

    @property
    def journal(self) -> Journal:
        """Lines that are kept as long as the objects are; the same one at each call."""
        if self._journal is None:
            self._journal = Journal()
        return self._journal

    _journal: Journal | None = None


ID_BYTES = 36
"""Of an object's id, as an owned tier is given it."""
MAX_NAME_BYTES = 64
"""Of what a shared tier is given for an id."""
EPOCH_BYTES = 8
"""With which such a name begins: the epoch that it was written in, big endian."""


class Epoch(NamedTuple):
    """What a fleet has agreed to call the present.

    Args:
        number: 64 bits, like no other epoch's of that store.
        lasts_s: for how long, after somebody began to ask for it, he may take it for the present.
        marks: what was cleared of it while it lasted.
    """

    number: int
    lasts_s: float
    marks: tuple[Mark, ...] = ()


class SharedTier(Store):
    """A store that a fleet writes to: what it holds is known by asking, its room is its own.

    Objects go by *names*: ids of up to `MAX_NAME_BYTES` that begin with an epoch. The store keeps
    the present epoch in a small object of its own. Nobody asks for names of another one, so
    whoever begins a new epoch clears the store for all, once nobody can take the old one for the
    present any more.
    """

    capacity_bytes: int = 1 << 62
    """What it is meant to hold; as good as no bound where that is its own affair."""

    @abstractmethod
    def epoch(self) -> Epoch:
        """The present epoch; of those who ask a new store at once, one begins it for all."""

    @abstractmethod
    def begin_epoch(self) -> Epoch:
        """Begin a new epoch, and say which. It lasts as the one before."""

    def add_mark(self, mark: Mark) -> Epoch:
        """Note with the present epoch what counts as cleared; the epoch with it.

        A store that cannot change its epoch on a condition begins a new one, which clears more.
        """
        return self.begin_epoch()

    @abstractmethod
    def forget(self, epoch: int) -> int:
        """Remove the objects of a past epoch, to have their room; says how many. Best effort."""

    def touch(self, ids: Sequence[bytes]) -> None:
        """Note that these were used, for a store that evicts by use. Best effort."""

    def upkeep(self) -> None:
        """Do what is due now and then; called every few seconds, one call at a time."""
