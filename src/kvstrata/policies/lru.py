"""Least recently used: who was used longest ago goes first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from kvstrata.policies.base import Policy, check_arguments, unknown_key
from kvstrata.tables import Queue

ROUNDS_PER_POP = 256


class LRU(Policy):
    """Least recently used. Exact among unleased keys (see `Policy.evict`); ignores cost.

    Those of priority -1 go before all others, in the same order. One of 1 to 3 goes round so many
    times before it goes, as if it were used when its turn comes; a use gives it all of them again.
    One eviction lets at most `ROUNDS_PER_POP` keys go round.
    """

    def __init__(self, capacity_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity_bytes, clock)
        self._sizes: Queue[int] = Queue()
        self._first: Queue[int] = Queue()  # those of priority -1
        # What a walk has passed: older than all in `_sizes`, to which it goes back.
        self._passed: Queue[int] = Queue()
        self._turned: list[bytes] | None = None  # what went round since a walk began

    def insert(self, key: bytes, nbytes: int, cost: float = 0.0, priority: int = 0) -> None:
        check_arguments(nbytes, cost, priority)
        if not (priority or self._priorities or key in self):  # so are most
            self._sizes[key] = nbytes
            self._total_bytes += nbytes
            return
        priority = priority or self.priority_of(key)
        self.remove(key)
        self._prioritise(key, priority)
        self._queue_for(key)[key] = nbytes
        self._total_bytes += nbytes

    def insert_all(self, sizes: dict[bytes, int]) -> None:
        # A scan finds many at once: no call for each.
        elsewhere = len(self) > len(self._sizes) or self._priorities
        if elsewhere or any(map(self._sizes.__contains__, sizes)):
            super().insert_all(sizes)
            return
        check_arguments(min(sizes.values(), default=1), 0.0, 0)
        self._sizes.update(sizes)
        self._total_bytes += sum(sizes.values())

    def touch(self, key: bytes) -> None:
        queue = self._queue_for(key)
        self._rounds.pop(key, None)
        if key in queue:
            queue.move_to_end(key)
            return
        nbytes = self._passed.pop(key) or self.parking.discard(key)
        if nbytes is None:
            raise unknown_key(key)
        queue[key] = nbytes

    def touch_all(self, keys: Iterable[bytes]) -> None:
        # A match touches hundreds of keys at once, in two tiers: no call for each.
        keys = list(keys)
        absent = self._sizes.use_all(keys)
        if self._rounds:
            for key in keys:
                self._rounds.pop(key, None)
        if absent and len(self) > len(self._sizes):
            for key in absent:
                if key in self:
                    self.touch(key)
            self._sizes.use_all(keys)  # those that came back stand behind the others

    def remove(self, key: bytes) -> None:
        nbytes = self._queue_for(key).pop(key) or self._passed.pop(key) or self.parking.discard(key)
        if nbytes is not None:
            self._total_bytes -= nbytes
            self._forget_priority(key)

    def __len__(self) -> int:
        return len(self._sizes) + len(self._first) + len(self._passed) + len(self.parking)

    def __contains__(self, key: bytes) -> bool:
        return (
            key in self._sizes or key in self._first or key in self._passed or key in self.parking
        )

    def keys(self) -> Iterator[bytes]:
        for key, _ in self.parking.items():
            yield key
        yield from self._first
        yield from self._passed
        yield from self._sizes

    def walk(self) -> Iterator[bytes | None]:
        yield from self._rejoin()  # of a walk that was left
        turned: list[bytes] = []
        self._turned = turned
        try:
            yield from [key for key, _ in self.parking.items()] + list(self._first)
            for _ in range(len(self._sizes)):
                if not self._sizes:
                    break
                key, nbytes = self._sizes.popitem(last=False)
                self._passed[key] = nbytes
                yield key
            # What was next to go meanwhile, and did not, was perhaps not passed.
            yield from [key for key, _ in self.parking.items()] + turned
        finally:
            self._turned = None
        yield from self._rejoin()

    def _rejoin(self) -> Iterator[None]:
        while self._passed:
            key, nbytes = self._passed.popitem()
            self._sizes[key] = nbytes
            self._sizes.move_to_end(key, last=False)
            yield None

    def _queue_for(self, key: bytes) -> Queue[int]:
        return self._first if self._priorities.get(key, 0) < 0 else self._sizes

    def _pop(self) -> tuple[bytes, int] | None:
        if self._first:
            return self._first.popitem(last=False)
        rounds_left = ROUNDS_PER_POP if self._priorities else 0
        while queue := self._passed or self._sizes:
            key, nbytes = queue.popitem(last=False)
            if not rounds_left or not self._goes_round(key):
                return key, nbytes
            rounds_left -= 1
            self._sizes[key] = nbytes
            if self._turned is not None:
                self._turned.append(key)
        return None

    def check_integrity(self) -> None:
        super().check_integrity()
        parked = dict(self.parking.items())
        queues = (self._first, self._passed, self._sizes)
        for queue in queues:
            queue.check_integrity()
        places = [set(parked), *map(set, queues)]
        assert len(set().union(*places)) == len(self), "a key stands in two places"
        assert all(self.priority_of(key) < 0 for key in self._first)
        assert not any(self.priority_of(key) < 0 for key in (*self._passed, *self._sizes))
        total = sum(sum(place.values()) for place in (parked, *queues))
        assert total == self._total_bytes, f"{total} bytes held, {self._total_bytes} counted"
