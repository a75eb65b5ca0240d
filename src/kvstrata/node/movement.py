"""Bytes between the tiers: promotion into leased slots, and writing behind from committed ones.

Both run as tasks on the node's loop, with the work itself in the tiers' threads. A slot is held
from before its copy starts until after it has ended, whatever deadline passes in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstrata.node.background import Tasks
from kvstrata.node.backing import Backing
from kvstrata.node.host import HostMemory, Slot, SlotState, order_name
from kvstrata.node.write_behind import Origin, WriteBehind
from kvstrata.objects import ObjectHeader
from kvstrata.observe.counters import Counters


class Movement:
    """Moves objects between host memory and the slower tiers.

    Args:
        host: where promoted objects go and committed ones come from.
        backings: the slower tiers, fastest first.
        counters: the node's.
    """

    def __init__(self, host: HostMemory, backings: list[Backing], counters: Counters) -> None:
        self.arriving: dict[tuple[bytes, int], Slot] = {}
        self._filling: set[Slot] = set()
        self._host = host
        self._counters = counters
        self._tasks = Tasks(counters)
        self.behind = [WriteBehind(host, backing, counters, self._tasks) for backing in backings]

    def promote(
        self, key: bytes, part: int, nbytes: int, backing: Backing, stored: int
    ) -> Slot | None:
        """Start to bring an object into host memory.

        Args:
            key: of the chunk.
            part: which of its objects.
            nbytes: of the object when it is raw, so of the slot.
            backing: the tier it comes from.
            stored: of the object as it lies there.
        Returns:
            The slot that it will fill, held once for the caller; None when there is no room.
        """
        slot = self._host.allocate(nbytes)
        if slot is None:
            return None
        self.arriving[key, part] = slot
        self._filling.add(slot)
        self._host.hold(slot)
        self._tasks.spawn("a promotion", self._promote(key, part, slot, backing, stored))
        return slot

    def write_behind(self, origin: Origin, objects: Sequence[tuple[bytes, Slot]]) -> None:
        """Queue the published objects of a commit, head first, for every slower tier."""
        for behind in self.behind:
            behind.add(origin, objects)

    def forget(self, keys: set[bytes] | None) -> None:
        """Publish and write nothing that is on its way of these chunks (None: of all)."""
        for name in [name for name in self.arriving if keys is None or name[0] in keys]:
            del self.arriving[name]
        for behind in self.behind:
            behind.forget(keys)

    def filling(self) -> list[Slot]:
        """The slots that promotions are filling."""
        return list(self._filling)

    @property
    def queued_bytes(self) -> int:
        """What waits to be written behind, or is being written."""
        return sum(behind.queued_bytes for behind in self.behind)

    async def flush(self) -> None:
        """Wait until what is queued now has been written, or given up."""
        await asyncio.gather(*[behind.flush() for behind in self.behind])

    async def close(self, grace_s: float) -> None:
        """Stop moving: what had not begun is dropped, what runs may end within ``grace_s``."""
        self.forget(None)
        await self._tasks.wait(grace_s)
        await self._tasks.cancel()

    async def _promote(
        self, key: bytes, part: int, slot: Slot, backing: Backing, stored: int
    ) -> None:
        view = self._host.pool.view(slot.offset, slot.nbytes)

        def settle(header: ObjectHeader | None = None) -> None:
            self._settle(key, part, slot, header)

        try:
            # Past its deadline a thread may still write into the slot, so it stays withheld.
            header = await backing.read(key, part, stored, view, give_up=settle)
            settle(header)
            if slot.state is SlotState.READY and header is not None:
                self._copy_up(key, part, slot, backing, order_name(header.kind, header.order))
        finally:
            settle()
            self._host.unhold(slot)

    def _copy_up(self, key: bytes, part: int, slot: Slot, source: Backing, order: str) -> None:
        """Let the tiers between host memory and the one it came from have it too.

        Not those with a lossy codec: what comes back may have been through one already.
        """
        for behind in self.behind:
            backing = behind.backing
            if backing is source:
                break
            lossless = backing.choice is None or backing.choice.lossless
            if lossless and backing.find(key, part, None) is None:
                behind.add(Origin([key], part, order), [(key, slot)])

    def _settle(self, key: bytes, part: int, slot: Slot, header: ObjectHeader | None) -> None:
        """A promotion has come to its end, or to its deadline; only the first word counts."""
        if slot not in self._filling:
            return
        self._filling.discard(slot)
        wanted = self.arriving.get((key, part)) is slot
        if wanted:
            del self.arriving[key, part]
        if header is not None and wanted:
            self._host.publish(key, part, slot, order_name(header.kind, header.order))
        else:
            self._host.discard(slot)
        outcome = "done" if header is not None and wanted else "failed"
        self._counters.add("promotions_total", outcome=outcome)
        waiters, slot.waiters = slot.waiters or (), None
        for lease in waiters:
            lease.advance()
