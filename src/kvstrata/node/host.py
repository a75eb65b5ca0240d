"""Host memory: the slots of the pool, who holds them still, and what makes room.

A slot is allocated, filled (by a client that reserved it, or by a promotion), and published; from
then on it can be leased and evicted. Whatever happens, its bytes go back to the allocator only
when nobody holds the slot any more: an eviction, a clear or a failure only marks it gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

from kvstrata.memory import Pool, SlotAllocator
from kvstrata.node.index import Index
from kvstrata.objects import GROUP_BITS, object_id
from kvstrata.policies.base import Policy

if TYPE_CHECKING:
    from kvstrata.node.clients import Client
    from kvstrata.node.leases import Lease


def identity(key: bytes, part: int) -> bytes:
    """The object id of one part of a chunk."""
    return object_id(key, part >> 16, part & 0xFFFF)


MAX_PART: int = (1 << 16 + GROUP_BITS) - 1


def at_level(part: int, level: int) -> int:
    """The part of a coarser copy, which a slower tier may keep beside the object itself."""
    return part | level << 16 + GROUP_BITS


PORTABLE = "portable"
"""The name of the one order that every engine reads."""


def order_name(kind: str, order: str) -> str:
    """The one name under which readers ask for an object's byte order."""
    return order if kind == "native" else kind


class SlotState(IntEnum):
    """FILLING: bytes are on their way in. READY: published. GONE: never to be read again."""

    FILLING = 0
    READY = 1
    GONE = 2


class Slot:
    """A region of the pool with one object in it.

    ``holds`` counts those who need its bytes to stay: the one who fills it, leases, writes to
    slower tiers. ``waiters`` are leases that want to hear when it is filled or has failed.
    Of its ``num_leases`` the first is charged to its client, the ``payer``, until the last ends.
    ``passed_over`` is the chunk that could not be evicted because this slot of it was held.
    """

    __slots__ = ("holds", "nbytes", "num_leases", "offset", "order", "passed_over", "payer",
                 "state", "waiters")  # fmt: skip

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.order: str | None = None
        self.state = SlotState.FILLING
        self.holds = 0
        self.num_leases = 0
        self.payer: Client | None = None
        self.passed_over: bytes | None = None
        self.waiters: list[Lease] | None = None


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
        """A slot to fill, held once by the caller; evicts what it must, None if it may not.

        Args:
            nbytes: of the whole object.
        """
        if nbytes > self.pool.capacity_bytes:
            return None
        while (offset := self._allocator.allocate(nbytes)) is None:
            victim = self.index.victim(self._evictable)
            if victim is None:
                return None
            self.num_evicted += 1
            self.drop(victim)
        slot = Slot(offset, nbytes)
        slot.holds = 1
        self._loose.add(slot)
        return slot

    def publish(self, key: bytes, part: int, slot: Slot, order: str, cost: float = 1.0) -> None:
        """Make a filled slot readable; the caller's hold stays."""
        assert slot.state is SlotState.FILLING
        slot.order = order
        slot.state = SlotState.READY
        self._loose.discard(slot)
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

    def _evictable(self, key: bytes) -> bool:
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
