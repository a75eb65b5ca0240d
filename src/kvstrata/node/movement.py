"""Bytes between the tiers: promotion into leased slots, and writing behind from committed ones.

Both run as tasks on the node's loop, with the work itself in the tiers' threads. A slot is held
from before its copy starts until after it has ended, whatever deadline passes in between.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine

from kvstrata.node.backing import Backing
from kvstrata.node.host import HostMemory, Slot, SlotState, order_name
from kvstrata.observe.counters import Counters

logger = logging.getLogger(__name__)


class Movement:
    """Moves objects between host memory and the slower tiers.

    Args:
        host: where promoted objects go and committed ones come from.
        backings: the slower tiers, fastest first.
        queue_bytes: what may wait to be written behind; beyond it an object is skipped.
        counters: the node's.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        host: HostMemory,
        backings: list[Backing],
        queue_bytes: int,
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        self.arriving: dict[tuple[bytes, int], Slot] = {}
        self._unwanted: set[Slot] = set()
        self._host = host
        self._backings = backings
        self._queue_bytes = queue_bytes
        self._counters = counters
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._queue: deque[tuple[bytes, int, Slot, float]] = deque()
        self._queued_bytes = 0
        self._writing = 0
        self._idle: list[asyncio.Future[None]] = []

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait to be written behind, or are being written."""
        return self._queued_bytes

    def promote(self, key: bytes, part: int, nbytes: int, backing: Backing) -> Slot | None:
        """Start to bring an object into host memory.

        Returns:
            The slot that it will fill, held once for the caller; None when there is no room.
        """
        slot = self._host.allocate(nbytes)
        if slot is None:
            return None
        self.arriving[key, part] = slot
        self._host.hold(slot)
        self._spawn(self._promote(key, part, slot, backing))
        return slot

    def write_behind(self, key: bytes, part: int, slot: Slot, cost: float) -> None:
        """Queue a published object for the first slower tier; skipped when the queue is full."""
        for backing in self._backings[:1]:
            if not backing.writable:
                self._counters.add("write_behind_skipped_total", tier=backing.name, why="tier")
            elif self._queued_bytes + slot.nbytes > self._queue_bytes:
                self._counters.add("write_behind_skipped_total", tier=backing.name, why="queue")
            else:
                self._host.hold(slot)
                self._queued_bytes += slot.nbytes
                self._queue.append((key, part, slot, cost))
                if self._writing < backing.num_threads:
                    self._writing += 1
                    self._spawn(self._write(backing))

    def forget(self, keys: set[bytes] | None) -> None:
        """Let promotions of these chunks (None: of all) end without publishing anything."""
        for key, part in list(self.arriving):
            if keys is None or key in keys:
                self._unwanted.add(self.arriving.pop((key, part)))

    def filling(self) -> list[Slot]:
        """The slots that promotions are filling."""
        return [*self.arriving.values(), *self._unwanted]

    async def flush(self) -> None:
        """Wait until nothing is left to write behind."""
        if self._writing:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter

    async def close(self) -> None:
        """Stop moving; what had not begun is dropped."""
        while self._queue:
            _, _, slot, _ = self._queue.popleft()
            self._queued_bytes -= slot.nbytes
            self._host.unhold(slot)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)

    async def _promote(self, key: bytes, part: int, slot: Slot, backing: Backing) -> None:
        view = self._host.pool.view(slot.offset, slot.nbytes)
        reading = asyncio.ensure_future(backing.read(key, part, slot.nbytes, view))
        backing.last_progress = max(backing.last_progress, self._clock() - backing.deadline_s / 2)
        while not reading.done():
            await asyncio.wait({reading}, timeout=backing.deadline_s)
            if not reading.done() and self._clock() - backing.last_progress > backing.deadline_s:
                break
        header = reading.result() if reading.done() else None
        if self.arriving.get((key, part)) is slot:
            del self.arriving[key, part]
        wanted = slot not in self._unwanted
        self._unwanted.discard(slot)
        if header is not None and wanted:
            self._host.publish(key, part, slot, order_name(header.kind, header.order))
            self._counters.add("promoted_objects_total", tier=backing.name)
        else:
            self._host.discard(slot)
            self._counters.add("promotions_failed_total", tier=backing.name)
        waiters, slot.waiters = slot.waiters or (), None
        for lease in waiters:
            lease.advance()
        if not reading.done():
            backing.trip(TimeoutError(f"no read has ended for {backing.deadline_s:g} s"))
            # The thread may still write into the slot; it stays withheld until it has ended.
            await asyncio.wait({reading})
        self._host.unhold(slot)

    async def _write(self, backing: Backing) -> None:
        while self._queue:
            key, part, slot, cost = self._queue.popleft()
            try:
                if slot.state is SlotState.READY:
                    view = self._host.pool.view(slot.offset, slot.nbytes)
                    await backing.write(key, part, view, cost)
            finally:
                self._queued_bytes -= slot.nbytes
                self._host.unhold(slot)
        self._writing -= 1
        if not self._writing:
            waiters, self._idle = self._idle, []
            for waiter in waiters:
                waiter.set_result(None)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a transfer died of a bug", exc_info=error)
