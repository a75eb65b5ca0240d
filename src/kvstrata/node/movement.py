"""Bytes between the tiers: promotion into leased slots, and writing behind from committed ones.

Both run as tasks on the node's loop, with the work itself in the tiers' threads. A slot is held
from before its copy starts until after it has ended, whatever deadline passes in between.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstrata.node.background import Tasks, report_bug
from kvstrata.node.host import HostMemory, Slot, SlotState, order_name
from kvstrata.objects import ObjectHeader
from kvstrata.observe.counters import Counters

if TYPE_CHECKING:
    from kvstrata.node.backing import Backing


class _Commit:
    """The objects of one commit on their way into a slower tier."""

    __slots__ = ("cost", "num_left", "order", "part", "prefix")

    def __init__(self, prefix: list[bytes], part: int, order: str, cost: float) -> None:
        self.prefix = prefix
        self.part = part
        self.order = order
        self.cost = cost
        self.num_left = 0


class _Job:
    """One object to be written behind."""

    __slots__ = ("commit", "key", "slot")

    def __init__(self, commit: _Commit, key: bytes, slot: Slot) -> None:
        self.commit = commit
        self.key = key
        self.slot = slot


class Movement:
    """Moves objects between host memory and the slower tiers.

    Args:
        host: where promoted objects go and committed ones come from.
        backings: the slower tiers, fastest first.
        queue_bytes: what may wait to be written behind; beyond it an object is skipped.
        counters: the node's.
    """

    def __init__(
        self, host: HostMemory, backings: list[Backing], queue_bytes: int, counters: Counters
    ) -> None:
        self.arriving: dict[tuple[bytes, int], Slot] = {}
        self.queued_bytes = 0  # what waits to be written behind, or is being written
        self._filling: set[Slot] = set()
        self._host = host
        self._backings = backings
        self._queue_bytes = queue_bytes
        self._counters = counters
        self._tasks = Tasks(counters)
        self._queue: deque[_Job] = deque()
        self._jobs: set[_Job] = set()
        self._num_writers = 0
        self._flushes: list[tuple[set[_Job], asyncio.Future[None]]] = []

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

    def write_behind(
        self,
        prefix: list[bytes],
        part: int,
        order: str,
        objects: Sequence[tuple[bytes, Slot]],
        cost: float,
    ) -> None:
        """Queue the published objects of a commit, head first, for the first slower tier.

        When the queue is full it is the tail that is skipped. Yet tails are written first, so
        that the tier, now and after a restart, finds heads more recently used than their tails.
        """
        if not self._backings or not objects:
            return
        backing = self._backings[0]
        commit = _Commit(prefix, part, order, cost)
        jobs = []
        for key, slot in objects:
            if not backing.writable:
                self._counters.add("write_behind_skipped_total", tier=backing.name, why="tier")
            elif self.queued_bytes + slot.nbytes > self._queue_bytes:
                self._counters.add("write_behind_skipped_total", tier=backing.name, why="queue")
            else:
                self._host.hold(slot)
                self.queued_bytes += slot.nbytes
                jobs.append(_Job(commit, key, slot))
        commit.num_left = len(jobs)
        self._jobs.update(jobs)
        self._queue.extend(reversed(jobs))
        for _ in range(min(len(self._queue), backing.num_threads - self._num_writers)):
            self._num_writers += 1
            self._tasks.spawn("a writer", self._write(backing))

    def forget(self, keys: set[bytes] | None) -> None:
        """Publish and write nothing that is on its way of these chunks (None: of all)."""
        for name in [name for name in self.arriving if keys is None or name[0] in keys]:
            del self.arriving[name]
        for job in [job for job in self._queue if keys is None or job.key in keys]:
            self._queue.remove(job)
            self._finish(job)

    def filling(self) -> list[Slot]:
        """The slots that promotions are filling."""
        return list(self._filling)

    async def flush(self) -> None:
        """Wait until what is queued now has been written, or given up."""
        if self._jobs:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._flushes.append((set(self._jobs), done))
            await done

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
        finally:
            settle()
            self._host.unhold(slot)

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

    async def _write(self, backing: Backing) -> None:
        try:
            while self._queue:
                job = self._queue.popleft()
                try:
                    await self._write_one(job, backing)
                except Exception as error:
                    report_bug(self._counters, "a write", error)
                finally:
                    self._finish(job)
        finally:
            self._num_writers -= 1

    async def _write_one(self, job: _Job, backing: Backing) -> None:
        slot, commit = job.slot, job.commit
        if slot.state is SlotState.READY:
            view = self._host.pool.view(slot.offset, slot.nbytes)
            await backing.write(job.key, commit.part, view, commit.order, commit.cost)
        if commit.num_left == 1:
            # Written side by side they end in any order, and after the heads of earlier commits.
            backing.index.touch(commit.prefix)

    def _finish(self, job: _Job) -> None:
        job.commit.num_left -= 1
        self.queued_bytes -= job.slot.nbytes
        self._host.unhold(job.slot)
        self._jobs.discard(job)
        for jobs, done in self._flushes:
            jobs.discard(job)
            if not jobs and not done.done():
                done.set_result(None)
        self._flushes = [flush for flush in self._flushes if flush[0]]
