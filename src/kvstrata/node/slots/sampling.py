"""Verification of a sample of host hits: memory can rot too, and so can a client's pen slip."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from kvstrata.errors import CorruptObject, Incompatible, KVStrataError
from kvstrata.node.common.background import NICE, Tasks, Threads
from kvstrata.node.common.changes import Cause
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Row, Slot, SlotState
from kvstrata.objects import verify_object
from kvstrata.observe.counters import Counters
from kvstrata.parts import identity

logger = logging.getLogger(__name__)


class Sampler:
    """Verifies one host hit in ``every``, in a thread of its own, while its slot is held.

    Args:
        host: whose slots.
        every: 1 for every hit, 0 for none; at random with that mean otherwise.
        counters: the node's.
    """

    def __init__(self, host: HostMemory, every: int, counters: Counters) -> None:
        self._host = host
        self.every = every
        self._counters = counters
        self._tasks = Tasks(counters)
        self._thread = Threads(1, "kvstrata-verify", NICE)
        self._skip = 0

    def note_hits(self, keys: Sequence[bytes], parts: Sequence[int], rows: Sequence[Row]) -> None:
        """Hear of a match: ``rows`` are those of these parts of ``keys``, leased."""
        if not self.every:
            return
        num_slots, taken = len(rows) * len(parts), []
        while self._skip < num_slots:
            chunk, place = divmod(self._skip, len(parts))
            slot = rows[chunk].slots[place]
            # Not regular, or prompts of one length would always show the same chunk.
            self._skip += random.randint(1, 2 * self.every - 1)
            if slot.state is SlotState.READY:  # what is being promoted is verified anyway
                self._host.hold(slot)
                taken.append((keys[chunk], parts[place], slot))
        self._skip -= num_slots
        if taken:
            self._tasks.spawn("a verification", self._verify(taken))

    async def close(self) -> None:
        """Verify no more."""
        self._thread.close()
        await self._tasks.cancel()

    async def _verify(self, taken: Sequence[tuple[bytes, int, Slot]]) -> None:
        """Verify slots that are held, one after the other, and end the holds."""
        views = [self._host.pool.view(slot.offset, slot.nbytes) for _, _, slot in taken]
        names = [identity(key, part) for key, part, _ in taken]

        def work() -> list[KVStrataError | None]:
            return [_fault(view, name) for view, name in zip(views, names, strict=True)]

        try:
            faults = await asyncio.wrap_future(self._thread.submit(work))
            for (key, part, slot), name, fault in zip(taken, names, faults, strict=True):
                if fault is None:
                    self._counters.add("verified_objects_total", tier="host")
                    continue
                logger.error("host: object %s is rejected: %s", name.hex(), fault)
                self._counters.add("corrupt_objects_total", tier="host")
                if self._host.get(key, part) is slot:
                    self._host.drop_object(key, part, Cause.CORRUPT)
        finally:
            for _, _, slot in taken:
                self._host.unhold(slot)


def _fault(view: memoryview, name: bytes) -> KVStrataError | None:
    """What is wrong with an object in a slot, if anything is."""
    try:
        verify_object(view, name)
    except (CorruptObject, Incompatible) as error:
        return error
    return None
