"""What other nodes may have of this one's host memory: held still while it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstrata.errors import KVStrataError
from kvstrata.node.service.names import Where
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Slot
from kvstrata.objects import NAMESPACE_FIELD, OBJECT_ID_BYTES
from kvstrata.observe.counters import Counters
from kvstrata.parts import named

SLICE = 256


class Lender:
    """Finds objects of host memory by their names; lives on the node's loop.

    Args:
        host: host memory.
        counters: the node's.
    """

    def __init__(self, host: HostMemory, counters: Counters) -> None:
        self._host = host
        self._counters = counters

    async def sizes(self, names: Sequence[bytes]) -> list[int]:
        """The size of each object; 0: it is not here."""
        sizes: list[int] = []
        for start in range(0, len(names), SLICE):
            if start:
                await asyncio.sleep(0)
            found = [self._find(name) for name in names[start : start + SLICE]]
            sizes += [0 if slot is None else slot.nbytes for slot in found]
        return sizes

    def lend(self, name: bytes) -> tuple[Slot, memoryview] | None:
        """An object, held until `give_back`; None if it is not here."""
        slot = self._find(name)
        if slot is None:
            return None
        self._host.hold(slot)
        return slot, self._host.pool.view(slot.offset, slot.nbytes)

    def give_back(self, slot: Slot, *, sent: bool) -> None:
        """Nobody reads it any more."""
        self._host.unhold(slot)
        if sent:
            self._counters.add("peer_sent_bytes_total", slot.nbytes)

    def _find(self, name: bytes) -> Slot | None:
        try:
            key, part = named(name[-OBJECT_ID_BYTES:])
        except KVStrataError:
            return None
        slot = self._host.get(key, part)
        if slot is None or slot.order is None:
            return None
        namespace = bytes(self._host.pool.view(slot.offset, NAMESPACE_FIELD.stop)[NAMESPACE_FIELD])
        return slot if name == Where(0, namespace, slot.order).name(key, part) else None
