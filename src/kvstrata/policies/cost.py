"""GreedyDual-Size-Frequency: who saves the fewest seconds per byte goes first.

Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching
policy", HP Labs HPL-98-69R1, 1998, after Cao and Irani's GreedyDual-Size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from kvstrata.policies.base import Policy, check_arguments, unknown_key
from kvstrata.tables import Table

LOOKS_PER_POP = 256
WEIGHT = 4.0
REMEMBERED = 4
"""The typical cost is that of what was told lately: this many times the capacity, at the most."""


class _Entry:
    __slots__ = ("base", "cost", "key", "live", "nbytes", "order", "priority", "uses", "weight")

    def __init__(self, key: bytes, nbytes: int, cost: float, uses: int, weight: float) -> None:
        self.key = key
        self.nbytes = nbytes
        self.cost = cost
        self.weight = weight  # what its cost counts for: more or less, as was asked for
        self.uses = uses
        self.base = 0.0  # the inflation at its last use
        self.priority = 0.0
        self.order = 0
        self.live = True


_Item = tuple[float, int, _Entry]  # priority, order of use


class CostAware(Policy):
    """Evict by `inflation + uses * cost / nbytes`, lowest first, oldest use first among equals.

    Inflation is the priority of the dearest victim so far, so whatever is not used any more is
    overtaken in the end, however dear it was. Cost is seconds to recompute the key. One whose cost
    is unknown (a startup scan reads no file) counts as what a byte has cost lately. One that was
    asked to matter more or less, a priority of p, counts as `WEIGHT` ** p times as dear.

    No eviction stalls: it puts at most `LOOKS_PER_POP` used keys into their new places, and if
    the lowest key is not known by then, it takes the lowest that has been put into its place.
    About 300 bytes a key.
    """

    def __init__(self, capacity_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity_bytes, clock)
        self._entries: Table[_Entry] = Table()
        # One item per entry that is not parked, plus those of removed entries. A use raises an
        # entry's priority but not its item, which is corrected when it comes up. Until then it
        # is a lower bound, so the lowest item that needs no correction is the lowest entry.
        # Corrected items have a heap of their own, for when there is no time to find that one.
        self._new: list[_Item] = []
        self._corrected: list[_Item] = []
        self._dead_items = 0
        self._inflation = 0.0
        self._order = 0
        self._known_s = 0.0  # the sum of the costs that were told, and of the sizes they are for
        self._known_bytes = 0.0

    def insert(self, key: bytes, nbytes: int, cost: float = 0.0, priority: int = 0) -> None:
        check_arguments(nbytes, cost, priority)
        known = self._entries.get(key)
        cost = cost or self.cost_of(key)
        priority = priority or self.priority_of(key)
        weight = float(WEIGHT**priority)
        if known is not None and (known.nbytes, known.cost, known.weight) == (nbytes, cost, weight):
            self.touch(key)
            return
        uses = 0 if known is None else known.uses
        self.remove(key)  # its priority may fall, which an item in the heap cannot follow
        self._prioritise(key, priority)
        entry = self._entries[key] = _Entry(key, nbytes, cost, uses, weight)
        self._total_bytes += nbytes
        if cost:
            self._learn(cost, nbytes, known)
        self._use(entry)
        heappush(self._new, (entry.priority, entry.order, entry))

    def touch(self, key: bytes) -> None:
        entry = self._entries.get(key)
        if entry is None:
            raise unknown_key(key)
        self._use(entry)
        if self.parking.discard(key) is not None:
            heappush(self._new, (entry.priority, entry.order, entry))

    def remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        if entry is None:
            return
        self._total_bytes -= entry.nbytes
        self._forget_priority(key)
        if self.parking.discard(key) is None:
            entry.live = False
            self._dead_items += 1
            self._bound_dead_items()

    def cost_of(self, key: bytes) -> float:
        entry = self._entries.get(key)
        return 0.0 if entry is None else entry.cost

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def keys(self) -> Iterator[bytes]:
        for key, _ in self.parking.items():
            yield key
        for _, _, entry in self._items():
            if entry.live:
                yield entry.key

    def _use(self, entry: _Entry) -> None:
        self._order += 1
        entry.order = self._order
        entry.uses += 1
        entry.base = self._inflation
        entry.priority = max(entry.priority, self._priority(entry))

    def _priority(self, entry: _Entry) -> float:
        uses = entry.uses * entry.weight
        if entry.cost:
            return entry.base + uses * entry.cost / entry.nbytes
        return entry.base + uses * self._known_s / max(1.0, self._known_bytes)

    def _learn(self, cost: float, nbytes: int, before: _Entry | None) -> None:
        """A cost was told, of a key that was known as it was ``before``: a chunk grows by parts."""
        if before is not None and before.cost:
            cost, nbytes = cost - before.cost, nbytes - before.nbytes
        self._known_s = max(0.0, self._known_s + cost)
        self._known_bytes = max(0.0, self._known_bytes + nbytes)
        if self._known_bytes > REMEMBERED * self.capacity_bytes:
            self._known_s, self._known_bytes = self._known_s / 2, self._known_bytes / 2

    def _items(self) -> Iterator[_Item]:
        yield from self._corrected
        yield from self._new

    def _pop(self) -> tuple[bytes, int] | None:
        looks_left = LOOKS_PER_POP
        while self._new or self._corrected:
            heap = self._corrected
            if not heap or (looks_left > 0 and self._new and self._new[0] < heap[0]):
                heap = self._new
            _, order, entry = heappop(heap)
            if not entry.live:
                self._dead_items -= 1
            elif looks_left <= 0 or (entry.order == order and not self._has_risen(entry)):
                self._bound_dead_items()
                return entry.key, entry.nbytes
            else:
                looks_left -= 1
                heappush(self._corrected, (entry.priority, entry.order, entry))
        return None

    def _has_risen(self, entry: _Entry) -> bool:
        """Whether an unknown cost means more now than at the last use; notes that."""
        before, now = entry.priority, self._priority(entry)
        entry.priority = max(before, now)
        return now > before

    def _bound_dead_items(self) -> None:
        if self._dead_items > (len(self._new) + len(self._corrected)) // 2:
            self._new = [item for item in self._items() if item[2].live]
            heapify(self._new)
            self._corrected = []
            self._dead_items = 0

    def _evicted(self, key: bytes, nbytes: int) -> None:
        self._inflation = max(self._inflation, self._entries[key].priority)
        del self._entries[key]

    def check_integrity(self) -> None:
        super().check_integrity()
        parked = dict(self.parking.items())
        items = list(self._items())
        queued = {entry.key: entry for _, _, entry in items if entry.live}
        assert not parked.keys() & queued.keys(), "a key stands in two places"
        assert parked.keys() | queued.keys() == set(self._entries)
        assert all(self._entries[key] is entry for key, entry in queued.items())
        assert len(items) == len(queued) + self._dead_items
        assert self._dead_items <= len(items) // 2, "removed keys pile up"
        total = sum(entry.nbytes for _, entry in self._entries.items())
        assert total == self._total_bytes, f"{total} bytes held, {self._total_bytes} counted"
        assert all(item[:2] <= (item[2].priority, item[2].order) for item in items)
