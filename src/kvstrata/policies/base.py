"""What an eviction policy is: an order over keys, and the one loop that takes victims from it.

The node decides when to evict, how much, and what must stay; a policy only says who goes
first. A policy holds keys of whole chunks, not their bytes.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from kvstrata.errors import UsageError

Evictable = Callable[[bytes], bool]
"""Says whether a key may go now (it is not leased). Must not call the policy."""

LOOKS_PER_EVICTION = 16


class Policy(ABC):
    """An order of eviction over keys.

    Callers touch and insert the chunks of a prefix tail first and head last, so that the tail
    goes before its head. For the same reason `cost` must not rise from head to tail: whoever
    loses a chunk loses the use of every chunk behind it.

    Not thread-safe, never blocks: the node's loop owns it.

    Args:
        capacity_bytes: what the keys together may weigh. The node enforces it; a policy only
            takes the sizes of its queues from it.
        clock: seconds, monotonic; for policies that age keys by time.
    """

    def __init__(self, capacity_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        if capacity_bytes <= 0:
            raise UsageError(f"a policy over {capacity_bytes} bytes has nothing to order")
        self.capacity_bytes = capacity_bytes
        self.clock = clock
        self.parking = Parking()
        self._total_bytes = 0

    @abstractmethod
    def insert(self, key: bytes, nbytes: int, cost: float = 1.0) -> None:
        """Add a key. If it is present this is a touch, and the new size and cost hold.

        Args:
            nbytes: what the key weighs, at least 1.
            cost: seconds that recomputing it would take, finite and not negative; most
                policies ignore it.
        Raises:
            UsageError: `nbytes` or `cost` is out of range; nothing has changed.
        """

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """Note a use.

        Raises:
            UsageError: the key is not present. The node knows what it holds, so this is a bug
                there, and hiding it would let index and policy drift apart.
        """

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """Forget a key; one that is absent is fine."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    @abstractmethod
    def keys(self) -> Iterator[bytes]:
        """All keys, each once, roughly in eviction order (`lru`: exactly)."""

    @property
    def total_bytes(self) -> int:
        """The sum of the sizes of all keys."""
        return self._total_bytes

    def evict(self, evictable: Evictable) -> bytes | None:
        """Remove and return the next victim, or None if no key is evictable.

        A key that is not evictable is passed over and keeps its place before those behind it:
        it is parked, and looked at again. The cost is bounded: amortised over evictions,
        insertions and touches, at most `LOOKS_PER_EVICTION` + 1 calls of `evictable` each. With
        up to `LOOKS_PER_EVICTION` keys parked the order is exact; with n of them a key that
        became evictable again may be seen only after n / `LOOKS_PER_EVICTION` other victims.
        None always means that every key was looked at just now: end a batch there.

        If `evictable` raises, no key is lost.
        """
        key = self.parking.take(evictable)
        while key is None:
            following = self._pop()
            if following is None:
                key = self.parking.take(evictable, look_at_all=True)
                break
            self.parking.add(*following)
            if evictable(following[0]):
                key = following[0]
        if key is not None:
            nbytes = self.parking.discard(key)
            assert nbytes is not None
            self._total_bytes -= nbytes
            self._evicted(key, nbytes)
        return key

    @abstractmethod
    def _pop(self) -> tuple[bytes, int] | None:
        """Take the next key and its size out of the order; None if only parked keys remain."""

    def _evicted(self, key: bytes, nbytes: int) -> None:  # noqa: B027  most need nothing
        """Hook: the key has just been evicted."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Assert what must hold between calls: each key once, sizes add up."""


class Parking:
    """Keys that were next to go but could not, with their sizes, in the order to go.

    Looking at all of them at each eviction would be quadratic in a queue of leased keys. So all
    are looked at once in every n / `LOOKS_PER_EVICTION` evictions, and those found evictable
    go first, in order, until the next such sweep.
    """

    def __init__(self) -> None:
        self._sizes: dict[bytes, int] = {}
        self._ready: dict[bytes, None] = {}  # last in, first to go
        self._calls_since_sweep = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def items(self) -> Iterator[tuple[bytes, int]]:
        """Keys and sizes in order."""
        return iter(self._sizes.items())

    def add(self, key: bytes, nbytes: int) -> None:
        """Park a key behind all others."""
        self._sizes[key] = nbytes

    def discard(self, key: bytes) -> int | None:
        """Remove a key; return its size, or None if it was not parked."""
        self._ready.pop(key, None)
        return self._sizes.pop(key, None)

    def take(self, evictable: Evictable, look_at_all: bool = False) -> bytes | None:
        """Return (and leave parked) the first key that was found evictable and still is."""
        if not self._sizes:
            return None
        self._calls_since_sweep += 1
        if look_at_all or self._calls_since_sweep * LOOKS_PER_EVICTION >= len(self._sizes):
            self._sweep(evictable)
        while self._ready:
            key, _ = self._ready.popitem()
            if evictable(key):
                return key
        return None

    def _sweep(self, evictable: Evictable) -> None:
        # Copied, because a dictionary that has shrunk is slow to iterate until it is rebuilt.
        self._sizes = dict(self._sizes)
        self._ready = {key: None for key in reversed(self._sizes) if evictable(key)}
        self._calls_since_sweep = 0


def check_arguments(nbytes: int, cost: float) -> None:
    """Raise UsageError unless `insert` may take these."""
    if nbytes < 1:
        raise UsageError(f"a key of {nbytes} bytes cannot be ordered")
    if not 0 <= cost < math.inf:
        raise UsageError(f"a cost of {cost} s is not a finite time")


def unknown_key(key: bytes) -> UsageError:
    """The error for a touch of an absent key."""
    return UsageError(f"touch of unknown key {key.hex()}")
