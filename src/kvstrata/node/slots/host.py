"""Host memory: the slots of the pool, who holds them still, and what makes room.

A slot is allocated, filled (by a client that reserved it, or by a promotion), and published; from
then on it can be leased and evicted. Whatever happens, its bytes go back to the allocator only
when nobody holds the slot any more: an eviction, a clear or a failure only marks it gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kvstrata.memory.allocator import SlotAllocator
from kvstrata.memory.pool import Pool
from kvstrata.node.common.index import Index
from kvstrata.node.slots.room import chunks_to_drop
from kvstrata.node.slots.slot import Slot, SlotState
from kvstrata.policies.base import Policy

ASKED_PER_CHANGE = 64
"""A search in vain is not repeated before something has changed for every so many chunks that it
looked at: a pool in which nothing fits must not be searched for each request."""


class HostMemory:
    """The pool's slots and the index of those that are ready.

    Args:
        pool: where the bytes are.
        policy: orders chunks for eviction.
    """

    def __init__(self, pool: Pool, policy: Policy) -> None:
        self.pool = pool
        self.index: Index[Slot] = Index(pool.capacity_bytes, policy, lambda slot: slot.nbytes)
        self.num_evicted = 0
        self._allocator = SlotAllocator(pool.capacity_bytes)
        # Allocated but not in the index: being filled, or gone and still held.
        self._loose: set[Slot] = set()
        self._spared: set[bytes] = set()
        self._spared_once: list[bytes] = []
        # The size that nothing could make room for, how many chunks were looked at for it, and how
        # much has to change before that many are looked at again.
        self._no_room_for = pool.capacity_bytes + 1
        self._num_asked = 0
        self._patience = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pool in use, held ones that are gone included."""
        return self._allocator.allocated_bytes

    def get(self, key: bytes, part: int) -> Slot | None:
        """The ready slot of an object."""
        return self.index.get(key, part)

    def leading(self, keys: list[bytes], parts: list[int], orders: frozenset[str]) -> list[Slot]:
        """The slots of the leading chunks that are here whole, in orders that can be read."""
        slots: list[Slot] = []
        get = self.index.get
        for key in keys:
            for part in parts:
                slot = get(key, part)
                if slot is None or slot.order not in orders:
                    del slots[len(slots) // len(parts) * len(parts) :]
                    return slots
                slots.append(slot)
        return slots

    @contextmanager
    def sparing(self, keys: set[bytes]) -> Iterator[None]:
        """Evict none of these chunks in here: a prompt's tail must not cost it its head."""
        self._spared = keys
        try:
            yield
        finally:
            for key in self._spared_once:
                self.index.unpark(key)
            self._spared, self._spared_once = set(), []

    def allocate(self, nbytes: int) -> Slot | None:
        """A slot to fill, see `allocate_many`; None if there is no room."""
        slots = self.allocate_many(nbytes, 1)
        return slots[0] if slots else None

    def allocate_many(self, nbytes: int, count: int) -> list[Slot]:
        """Slots to fill, each held once by the caller, as many as there is room for.

        Evicts what it must; nothing for a slot that will not fit even so.

        Args:
            nbytes: of each whole object.
            count: how many at most.
        """
        slots: list[Slot] = []
        searched = nbytes >= self._no_room_for
        while len(slots) < count:
            offset = self._allocator.allocate(nbytes)
            if offset is not None:
                slot = Slot(offset, nbytes)
                slot.holds = 1
                slots.append(slot)
            elif searched:
                break
            else:
                searched = True
                self._make_room(nbytes, count - len(slots))
        self._loose.update(slots)
        return slots

    def publish(self, key: bytes, part: int, slot: Slot, order: str, cost: float = 1.0) -> None:
        """Make a filled slot readable; the caller's hold stays."""
        assert slot.state is SlotState.FILLING
        slot.order = order
        slot.state = SlotState.READY
        self._loose.discard(slot)
        self._note_change()
        fits = self.index.claim(slot.nbytes)
        assert fits, "the allocator gave more than the pool has"
        replaced = self.index.put(key, part, slot, cost)
        if replaced is not None:
            self._retire(replaced)

    def discard(self, slot: Slot) -> None:
        """Give up a slot that was never published; the caller's hold stays."""
        assert slot.state is SlotState.FILLING
        slot.state = SlotState.GONE

    def hold(self, slot: Slot) -> None:
        """Keep the slot's bytes where they are."""
        slot.holds += 1

    def hold_all(self, slots: Iterable[Slot]) -> None:
        """`hold` each of them."""
        for slot in slots:
            slot.holds += 1

    def unhold_all(self, slots: Iterable[Slot]) -> None:
        """`unhold` each of them."""
        for slot in slots:
            if slot.holds > 1 or (slot.state is SlotState.READY and slot.passed_over is None):
                slot.holds -= 1
            else:
                self.unhold(slot)

    def unhold(self, slot: Slot) -> None:
        """End one hold; the last one frees a slot that is gone, and lets the others be evicted."""
        assert slot.holds > 0
        slot.holds -= 1
        if slot.holds == 0:
            if slot.passed_over is not None:
                self.index.unpark(slot.passed_over)
                slot.passed_over = None
                self._note_change()
            if slot.state is SlotState.GONE:
                self._free(slot)

    def drop(self, key: bytes) -> int:
        """Forget a chunk; returns the number of its objects."""
        objects = self.index.pop_chunk(key)
        for _, slot in objects:
            self._retire(slot)
        return len(objects)

    def drop_object(self, key: bytes, part: int) -> None:
        """Forget one object."""
        slot = self.index.pop(key, part)
        if slot is not None:
            self._retire(slot)

    def check_integrity(self, fillers: Iterable[Slot] = ()) -> None:
        """Raise AssertionError unless every byte of the pool is accounted for.

        Args:
            fillers: the slots that reservations and promotions say they are filling.
        """
        self._allocator.check_integrity()
        self.index.check_integrity()
        loose = sum(slot.nbytes for slot in self._loose)
        assert self.index.used_bytes + loose == self.allocated_bytes, (
            f"{self.index.used_bytes} indexed + {loose} loose != {self.allocated_bytes} allocated"
        )
        for slot in self._loose:
            assert slot.state is not SlotState.READY
            assert slot.holds > 0, "a slot that nobody holds was not freed"
        filling = {slot for slot in self._loose if slot.state is SlotState.FILLING}
        assert filling == set(fillers), "a slot is being filled by nobody, or twice"

    def close(self) -> None:
        """Let go of the pool."""
        self.pool.close()

    def _make_room(self, nbytes: int, count: int) -> None:
        need = self._allocator.rounded(nbytes)
        self._num_asked = 0
        chosen = chunks_to_drop(self.index, self._allocator, self._evictable, need, count)
        for key in chosen:
            self.num_evicted += 1
            self.drop(key)
        patience = self._num_asked // ASKED_PER_CHANGE - len(self._spared_once)
        if not chosen and patience > 0:
            self._no_room_for, self._patience = nbytes, patience

    def _note_change(self) -> None:
        """Something may be free, or evictable, that was not."""
        self._patience -= 1
        if self._patience <= 0:
            self._no_room_for = self.pool.capacity_bytes + 1

    def _evictable(self, key: bytes) -> bool:
        self._num_asked += 1
        if key in self._spared:
            self._spared_once.append(key)
            return False
        for _, slot in self.index.objects(key):
            if slot.holds:
                slot.passed_over = key
                return False
        return True

    def _retire(self, slot: Slot) -> None:
        slot.state = SlotState.GONE
        self._loose.add(slot)
        if slot.holds == 0:
            self._free(slot)

    def _free(self, slot: Slot) -> None:
        self._loose.discard(slot)
        self._allocator.free(slot.offset)
        self._note_change()
