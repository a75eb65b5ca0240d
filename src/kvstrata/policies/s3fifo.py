"""S3-FIFO: three plain queues, so that keys used once leave before they push out the rest.

Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Differs:
queues are measured in bytes, leased keys are passed over, and one eviction gives at most
`TURNS_PER_POP` second chances.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from kvstrata.policies.base import Policy, check_arguments, unknown_key
from kvstrata.tables import Queue, Table

SMALL_SHARE = 0.1
MAX_HITS = 3  # two bits, as in the paper
HITS_TO_STAY = 2
TURNS_PER_POP = 1000  # about a millisecond


class S3FIFO(Policy):
    """A small queue for new keys, a main queue for proven ones, and a memory of the evicted.

    New keys enter the small queue (10% of the capacity). At its end those used at least twice
    move to main, the others are evicted and remembered as ghosts; a ghost that is inserted
    again enters main at once. At the end of main a used key goes round again with one use less.
    Ghosts are bare keys, as many as would fill main. Ignores cost.

    Those of priority -1 have a queue of their own, which is emptied first, oldest use first. One of
    1 to 3 goes round in main so many times when it would go; a use gives it all of them again.
    """

    def __init__(self, capacity_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity_bytes, clock)
        self._small_target = int(capacity_bytes * SMALL_SHARE)
        self._small: Queue[int] = Queue()  # key -> size, oldest first
        self._main: Queue[int] = Queue()
        self._first: Queue[int] = Queue()  # those of priority -1
        self._ghost: Queue[int] = Queue()
        self._hits: Table[int] = Table()  # only keys used since they entered; at most MAX_HITS
        self._small_bytes = 0
        self._ghost_bytes = 0

    def insert(self, key: bytes, nbytes: int, cost: float = 0.0, priority: int = 0) -> None:
        check_arguments(nbytes, cost, priority)
        queue = self._queue_of(key)
        priority = priority or self.priority_of(key)
        if queue is not None and (queue is self._first) != (priority < 0):
            self.remove(key)
            queue = None
        self._prioritise(key, priority)
        if queue is not None:
            grown = nbytes - queue[key]
            queue[key] = nbytes  # keeps its place
            self._total_bytes += grown
            if queue is self._small:
                self._small_bytes += grown
            self.touch(key)
            return
        wanted = self.parking.discard(key)
        if wanted is not None:
            self._total_bytes -= wanted
        ghost = self._ghost.pop(key)
        if ghost is not None:
            self._ghost_bytes -= ghost
        if priority < 0:
            self._first[key] = nbytes
        elif wanted is not None or ghost is not None:
            self._main[key] = nbytes
        else:
            self._small[key] = nbytes
            self._small_bytes += nbytes
        self._total_bytes += nbytes

    def touch(self, key: bytes) -> None:
        self._rounds.pop(key, None)
        if key in self._first:
            self._first.move_to_end(key)
            return
        if self._queue_of(key) is not None:
            self._hits[key] = min((self._hits.get(key) or 0) + 1, MAX_HITS)
            return
        nbytes = self.parking.discard(key)
        if nbytes is None:
            raise unknown_key(key)
        # It stood at the end of its queue; used there, it goes round again.
        (self._first if self.priority_of(key) < 0 else self._main)[key] = nbytes

    def remove(self, key: bytes) -> None:
        queue = self._queue_of(key)
        nbytes = self.parking.discard(key) if queue is None else queue.pop(key)
        if nbytes is None:
            return
        self._total_bytes -= nbytes
        if queue is self._small:
            self._small_bytes -= nbytes
        self._hits.pop(key)
        self._forget_priority(key)

    def __len__(self) -> int:
        return len(self._first) + len(self._small) + len(self._main) + len(self.parking)

    def __contains__(self, key: bytes) -> bool:
        return key in self._small or key in self._main or key in self._first or key in self.parking

    def keys(self) -> Iterator[bytes]:
        for key, _ in self.parking.items():
            yield key
        yield from self._first
        yield from self._small
        yield from self._main

    def _queue_of(self, key: bytes) -> Queue[int] | None:
        if key in self._small:
            return self._small
        if key in self._first:
            return self._first
        return self._main if key in self._main else None

    def _pop(self) -> tuple[bytes, int] | None:
        if self._first:
            return self._first.popitem(last=False)
        # Every turn that returns nothing takes uses or rounds away, so the queues do not turn for
        # ever; past the bound the next key goes as if it were unused.
        turns_left = TURNS_PER_POP
        while self._small or self._main:
            turns_left -= 1
            if self._small and (self._small_bytes > self._small_target or not self._main):
                key, nbytes = self._small.popitem(last=False)
                self._small_bytes -= nbytes
                unused = (self._hits.pop(key) or 0) < HITS_TO_STAY
            else:
                key, nbytes = self._main.popitem(last=False)
                hits = self._hits.pop(key) or 0
                unused = hits == 0
                if hits > 1:
                    self._hits[key] = hits - 1
            if turns_left < 0 or (unused and not self._goes_round(key)):
                self._hits.pop(key)
                return key, nbytes
            self._main[key] = nbytes
        return None

    def _evicted(self, key: bytes, nbytes: int) -> None:
        self._ghost[key] = nbytes
        self._ghost_bytes += nbytes
        while self._ghost_bytes > self.capacity_bytes - self._small_target:
            _, gone = self._ghost.popitem(last=False)
            self._ghost_bytes -= gone

    def check_integrity(self) -> None:
        super().check_integrity()
        parked = dict(self.parking.items())
        queues = (self._first, self._small, self._main, self._ghost)
        for queue in queues:
            queue.check_integrity()
        places = [set(parked), *map(set, queues)]
        assert len(set().union(*places)) == sum(map(len, places)), "a key stands in two places"
        assert all(self.priority_of(key) < 0 for key in self._first)
        assert not any(self.priority_of(key) < 0 for key in (*self._small, *self._main))
        small = sum(self._small.values())
        assert small == self._small_bytes
        held = small + sum(self._first.values()) + sum(self._main.values())
        total = held + sum(parked.values())
        assert total == self._total_bytes, f"{total} bytes held, {self._total_bytes} counted"
        assert sum(self._ghost.values()) == self._ghost_bytes
        assert self._ghost_bytes <= self.capacity_bytes - self._small_target
        assert set(self._hits) <= {*self._small, *self._main}
        assert all(0 < hits <= MAX_HITS for _, hits in self._hits.items())
