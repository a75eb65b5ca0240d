"""What an eviction policy is: an order over keys, and the one loop that takes victims from it.

The node decides when to evict, how much, and what must stay; a policy only says who goes
first. A policy holds keys of whole chunks, not their bytes.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush

from kvstrata.errors import UsageError

PRIORITIES = range(-1, 4)
"""What a chunk may matter more or less than others: -1 goes first, 0 is usual, 3 stays longest."""

Evictable = Callable[[bytes], bool]
"""Says whether a key may go now (it is not leased). Must not call the policy."""


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
        # Of the keys whose priority is not 0, and how often each went round for it since its use.
        self._priorities: dict[bytes, int] = {}
        self._rounds: dict[bytes, int] = {}

    @abstractmethod
    def insert(self, key: bytes, nbytes: int, cost: float = 0.0, priority: int = 0) -> None:
        """Add a key. If it is present this is a touch, and the new size and cost hold.

        Args:
            nbytes: what the key weighs, at least 1.
            cost: seconds that recomputing it would take, finite and not negative, 0: unknown,
                so that one that is known still holds; most policies ignore it.
            priority: one of `PRIORITIES`; 0: nothing is said, so what was said before holds.
        Raises:
            UsageError: an argument is out of range; nothing has changed.
        """

    def insert_all(self, sizes: dict[bytes, int]) -> None:
        """Add keys by their sizes, in this order, with nothing said of costs and priorities."""
        for key, nbytes in sizes.items():
            self.insert(key, nbytes)

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """Note a use.

        Raises:
            UsageError: the key is not present. The node knows what it holds, so this is a bug
                there, and hiding it would let index and policy drift apart.
        """

    def touch_all(self, keys: Iterable[bytes]) -> None:
        """Touch those of these keys that are present, in this order."""
        for key in keys:
            if key in self:
                self.touch(key)

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """Forget a key; one that is absent is fine."""

    def cost_of(self, key: bytes) -> float:
        """The cost of a key; 0 where it is unknown, or of no interest."""
        return 0.0

    def priority_of(self, key: bytes) -> int:
        """The priority of a key; 0 where nothing was said."""
        return self._priorities.get(key, 0)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, key: bytes) -> bool: ...

    @abstractmethod
    def keys(self) -> Iterator[bytes]:
        """All keys, each once, roughly in eviction order (`lru`: exactly)."""

    def walk(self) -> Iterator[bytes | None]:
        """All keys that stay, roughly in eviction order, while others may change the policy.

        One that is used, or comes in, while this goes on may be told or not, and any of them twice.
        None tells nothing. The order of eviction is the same as without it. One walk at a time.
        This one lists them at once; a policy that may hold millions goes step by step.
        """
        yield from list(self.keys())

    @property
    def total_bytes(self) -> int:
        """The sum of the sizes of all keys."""
        return self._total_bytes

    def evict(self, evictable: Evictable) -> bytes | None:
        """Remove and return the next victim, or None if no key is evictable.

        A key that is not evictable is passed over and keeps its place before those behind it: it
        is parked, and not asked for again until `unpark` says that it is worth it. So however
        many keys are leased, each costs one call of ``evictable`` per lease, not per eviction.

        If ``evictable`` raises, no key is lost.
        """
        while True:
            key = self.parking.first()
            if key is None:
                following = self._pop()
                if following is None:
                    return None
                self.parking.add(*following)
                key = following[0]
            if evictable(key):
                break
            self.parking.pass_over()
        self.take(key)
        return key

    def emptied(self) -> Policy:
        """A policy of the same kind that holds nothing."""
        return type(self)(self.capacity_bytes, self.clock)

    def take(self, key: bytes) -> None:
        """Evict a key out of its turn, one that `evict` has passed over."""
        nbytes = self.parking.discard(key)
        assert nbytes is not None, "only what was passed over can be taken"
        self._total_bytes -= nbytes
        self._evicted(key, nbytes)
        self._forget_priority(key)

    def unpark(self, key: bytes) -> None:
        """Note that a key which `evict` passed over may go now; of other keys this is no news."""
        self.parking.release(key)

    @abstractmethod
    def _pop(self) -> tuple[bytes, int] | None:
        """Take the next key and its size out of the order; None if only parked keys remain."""

    def _evicted(self, key: bytes, nbytes: int) -> None:  # noqa: B027  most need nothing
        """Hook: the key has just been evicted."""

    def _prioritise(self, key: bytes, priority: int) -> int:
        """Note what was said of a key that is used; its priority now."""
        if priority:
            self._priorities[key] = priority
        self._rounds.pop(key, None)
        return self.priority_of(key)

    def _goes_round(self, key: bytes) -> bool:
        """Whether a key whose turn has come stays for its priority, as often as that says."""
        gone = self._rounds.get(key, 0)
        if gone >= self.priority_of(key):
            return False
        self._rounds[key] = gone + 1
        return True

    def _forget_priority(self, key: bytes) -> None:
        self._priorities.pop(key, None)
        self._rounds.pop(key, None)

    @abstractmethod
    def check_integrity(self) -> None:
        """Assert what must hold between calls: each key once, sizes add up."""
        assert all(key in self and rank in PRIORITIES for key, rank in self._priorities.items())
        assert all(0 < gone <= self.priority_of(key) for key, gone in self._rounds.items())


class Parking:
    """Keys that were next to go, with their sizes, in that order; those that could not are held.

    A key enters free. `pass_over` holds back the first free one, `release` frees it again, in
    its old place.
    """

    def __init__(self) -> None:
        self._spots: dict[bytes, tuple[int, int]] = {}  # number, size; in order of the numbers
        self._free: list[tuple[int, bytes]] = []  # a heap; items of keys that have left are stale
        self._number = 0

    def __len__(self) -> int:
        return len(self._spots)

    def __contains__(self, key: object) -> bool:
        return key in self._spots

    def items(self) -> Iterator[tuple[bytes, int]]:
        """Keys and sizes in order."""
        for key, (_, nbytes) in self._spots.items():
            yield key, nbytes

    def add(self, key: bytes, nbytes: int) -> None:
        """Park a key behind all others, free."""
        self._number += 1
        self._spots[key] = self._number, nbytes
        heappush(self._free, (self._number, key))

    def discard(self, key: bytes) -> int | None:
        """Remove a key; return its size, or None if it was not parked."""
        spot = self._spots.pop(key, None)
        return None if spot is None else spot[1]

    def first(self) -> bytes | None:
        """The first free key, or None."""
        while self._free:
            number, key = self._free[0]
            if self._spots.get(key, (0, 0))[0] == number:
                return key
            heappop(self._free)
        return None

    def pass_over(self) -> None:
        """Hold back the key that `first` has just returned."""
        heappop(self._free)

    def release(self, key: bytes) -> None:
        """Free a key that was held back."""
        spot = self._spots.get(key)
        if spot is not None:
            heappush(self._free, (spot[0], key))


def check_arguments(nbytes: int, cost: float, priority: int) -> None:
    """Raise UsageError unless `insert` may take these."""
    if nbytes < 1:
        raise UsageError(f"a key of {nbytes} bytes cannot be ordered")
    if not 0 <= cost < math.inf:
        raise UsageError(f"a cost of {cost} s is not a finite time")
    if priority not in PRIORITIES:
        raise UsageError(f"{priority} is no priority: {PRIORITIES[0]} to {PRIORITIES[-1]}")


def unknown_key(key: bytes) -> UsageError:
    """The error for a touch of an absent key."""
    return UsageError(f"touch of unknown key {key.hex()}")
