"""What other nodes may have of this one's host memory: held still while it is sent.

What was computed for another node is kept until that has it, or has not come for it in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvstrata.errors import KVStrataError
from kvstrata.header import OBJECT_ID_BYTES
from kvstrata.node.common.standing import alone
from kvstrata.node.service.names import Where
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.reservations import Reservation
from kvstrata.node.slots.slot import Slot, SlotState
from kvstrata.objects import NAMESPACE_FIELD
from kvstrata.observe.counters import Counters
from kvstrata.parts import named
from kvstrata.wire.protocol import PRESENT

KEEP_S = 30.0
"""For how long what was computed for another node is kept for it."""
SWEEP_S = 1.0


class Lender:
    """Finds objects of host memory by their names; lives on the node's loop.

    Args:
        host: host memory.
        most_bytes: what may be kept for other nodes at once.
        counters: the node's.
        clock: monotonic seconds.
    """

    def __init__(
        self, host: HostMemory, most_bytes: int, counters: Counters, clock: Callable[[], float]
    ) -> None:
        self._host = host
        self._most_bytes = most_bytes
        self._counters = counters
        self._clock = clock
        self._kept: dict[Slot, float] = {}  # until when; the first to end is the first
        self.kept_bytes = 0
        self.allowed: Callable[[], bool] = alone
        """Whether others may read from this node."""

    def keep(self, key: bytes, part: int) -> None:
        """Keep an object for another node, if it is here and there is room for that."""
        slot = self._host.get(key, part)
        if slot is None:
            return
        if self._kept.pop(slot, None) is None:
            if self.kept_bytes + slot.nbytes > self._most_bytes:
                self._counters.add("unkept_objects_total")
                return
            self._host.hold(slot)
            self.kept_bytes += slot.nbytes
        self._kept[slot] = self._clock() + KEEP_S

    def keep_present(self, reservation: Reservation, offsets: Sequence[int]) -> None:
        """Keep what need not be written, since it is here."""
        for key, offset in zip(reservation.prefix[reservation.first :], offsets, strict=True):
            if offset == PRESENT:
                self.keep(key, reservation.part)

    async def run(self) -> None:
        """Let go of what nobody came for, and of what was cleared."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._clock()
            for slot in [one for one, until in self._kept.items() if until <= now]:
                self._let_go(slot)
                self._counters.add("kept_in_vain_total")
            for slot in [one for one in self._kept if one.state is SlotState.GONE]:
                self._let_go(slot)

    def _let_go(self, slot: Slot) -> None:
        if self._kept.pop(slot, None) is not None:
            self.kept_bytes -= slot.nbytes
            self._host.unhold(slot)

    def sizes(self, names: Sequence[bytes]) -> list[int]:
        """The size of each object; 0: it is not here. Not of many at once: this holds the loop."""
        found = [self.find(name) for name in names]
        return [0 if slot is None else slot.nbytes for slot in found]

    def find(self, name: bytes) -> Slot | None:
        """An object that is ready; None if it is not here. Of any thread.

        Where it is not held, its bytes are its own as long as its slot is ready: off the loop that
        is known of those that were read before one looks.
        """
        if not self.allowed():
            return None
        try:
            key, part = named(name[-OBJECT_ID_BYTES:])
        except KVStrataError:
            return None
        slot = self._host.get(key, part)
        if slot is None or slot.order is None:
            return None
        namespace = bytes(self._host.pool.view(slot.offset, NAMESPACE_FIELD.stop)[NAMESPACE_FIELD])
        return slot if name == Where(0, namespace, slot.order).name(key, part) else None

    def lend(self, name: bytes) -> Slot | None:
        """An object, held until `give_back`; None if it is not here."""
        slot = self.find(name)
        if slot is not None:
            self._host.hold(slot)
        return slot

    def view(self, slot: Slot) -> memoryview:
        """The bytes of what is lent."""
        return self._host.pool.view(slot.offset, slot.nbytes)

    def address(self, slot: Slot) -> int:
        """Where in this process's memory they begin."""
        return self._host.pool.address + slot.offset

    def give_back(self, slot: Slot, *, by: str = "") -> None:
        """Nobody reads it any more.

        Args:
            by: what the bytes went by, if they did.
        """
        self._host.unhold(slot)
        if by:
            self.sent(slot, by=by)

    def sent(self, slot: Slot, *, by: str) -> None:
        """Another node has its bytes, by this way."""
        self._let_go(slot)
        self._counters.add("peer_sent_bytes_total", slot.nbytes, by=by)
