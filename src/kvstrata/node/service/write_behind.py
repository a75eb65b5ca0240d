"""What was committed to host memory, on its way into one slower tier.

A committed slot is held until its object has been written or given up. The queue is bounded in
bytes; what does not fit is skipped, and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from kvstrata.errors import CorruptObject
from kvstrata.node.common.background import Tasks, report_bug
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.slices import Work
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.origin import Origin
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Slot, SlotState
from kvstrata.observe.counters import Counters
from kvstrata.observe.tracing import Span, Tracer
from kvstrata.parts import identity

logger = logging.getLogger(__name__)


ADD_SLICE = 64
STRIKE_SLICE = 128
TOUCH_SLICE = 1024


class _Commit:
    """The objects of one commit on their way into the tier."""

    __slots__ = ("keys", "left", "nbytes", "num_left", "origin", "span", "spared")

    def __init__(self, origin: Origin, objects: list[tuple[bytes, Slot]]) -> None:
        self.origin = origin
        self.keys = [key for key, _ in objects]
        self.left = objects  # that are not queued yet
        self.num_left = len(objects)  # that are not written yet
        self.spared: asyncio.Task[set[bytes]] | None = None  # which of them need no writing
        self.span: Span | None = None
        self.nbytes = 0  # that were written


class _Job:
    """One object to be written."""

    __slots__ = ("commit", "forgotten", "key", "slot")

    def __init__(self, commit: _Commit, key: bytes, slot: Slot) -> None:
        self.commit = commit
        self.key = key
        self.slot = slot
        self.forgotten = False  # since it left the queue


class WriteBehind:
    """Writes committed objects into one tier, a few at a time.

    Args:
        host: where they lie meanwhile.
        backing: the tier.
        counters: the node's.
        tasks: which the writers are among.
        tracer: of those stores that are traced.
    """

    def __init__(
        self,
        host: HostMemory,
        backing: Backing,
        counters: Counters,
        tasks: Tasks,
        tracer: Tracer | None = None,
    ) -> None:
        self.backing = backing
        self.queued_bytes = 0  # what waits to be written, or is being written
        self._host = host
        self._counters = counters
        self._tasks = tasks
        self._tracer = tracer
        self._queue: OrderedDict[_Job, None] = OrderedDict()
        self._queued: dict[bytes, list[_Job]] = {}  # the same by chunk
        # forgotten, and still to be let go
        self._struck: deque[OrderedDict[_Job, None]] = deque()
        self._striking = False
        self._jobs: set[_Job] = set()
        self._begun: set[_Job] = set()  # of which some are still asked about
        self._adding: set[_Commit] = set()  # of which some are not queued yet
        self._num_writers = 0
        self._flushes: list[tuple[set[_Job], asyncio.Future[None]]] = []

    def add(self, origin: Origin, objects: Sequence[tuple[bytes, Slot]]) -> Work[None]:
        """Take the published objects of a commit, head first, if the tier may have them.

        When the queue is full it is the tail that is skipped. Yet tails are written first, so
        that the tier, now and after a restart, finds heads more recently used than their tails.

        Returns:
            What queues them, in slices.
        """
        commit = _Commit(origin, self._take(origin, objects))
        if origin.trace and self._tracer is not None and commit.left:
            name = f"kvstrata.{self.backing.name}.write"
            commit.span = self._tracer.start(name, origin.trace)
        self._adding.add(commit)
        return self._enqueue_slices(commit)

    def _take(
        self, origin: Origin, objects: Sequence[tuple[bytes, Slot]]
    ) -> list[tuple[bytes, Slot]]:
        """Those of a commit's objects that will be written; they are held and counted."""
        backing = self.backing
        if origin.tiers and backing.name not in origin.tiers:
            return []
        if origin.is_tail and backing.must_be_asked:
            return []  # nobody asks for what only marks can find
        if not backing.writable:
            self._skipped(len(objects), "tier")
            return []
        taken, room = [], backing.queue_bytes - self.queued_bytes
        for key, slot in objects:
            if slot.nbytes <= room:
                room -= slot.nbytes
                self._host.hold(slot)
                taken.append((key, slot))
        self.queued_bytes = backing.queue_bytes - room
        self._skipped(len(objects) - len(taken), "queue")
        return taken

    def _enqueue_slices(self, commit: _Commit) -> Work[None]:
        while self._enqueue(commit, ADD_SLICE):
            yield None

    def _enqueue(self, commit: _Commit, most: int) -> bool:
        """Queue the next objects of a commit, the last first; whether there are more of them."""
        for _ in range(min(most, len(commit.left))):
            job = _Job(commit, *commit.left.pop())
            self._jobs.add(job)
            self._queue[job] = None
            self._queued.setdefault(job.key, []).append(job)
        for _ in range(min(len(self._queue), self.backing.num_threads - self._num_writers)):
            self._num_writers += 1
            self._tasks.spawn("a writer", self._write())
        if not commit.left:
            self._adding.discard(commit)
        return bool(commit.left)

    def _enqueue_all(self) -> None:
        """Queue now what would have been in the slices to come."""
        for commit in list(self._adding):
            self._enqueue(commit, len(commit.left))

    def forget(self, keys: set[bytes] | None) -> None:
        """Write nothing that has not begun of these chunks (None: of all)."""
        self._enqueue_all()
        for job in self._begun:
            job.forgotten = job.forgotten or keys is None or job.key in keys
        struck: OrderedDict[_Job, None] = OrderedDict()
        if keys is None:
            struck, self._queue, self._queued = self._queue, struck, {}
        else:
            for key in keys:
                for job in self._queued.pop(key, ()):
                    del self._queue[job]
                    struck[job] = None
        self._struck.append(struck)
        self._strike_some()
        if self._struck and not self._striking:
            self._striking = True
            self._tasks.spawn("an end of writes", self._strike_rest())

    def check_integrity(self) -> None:
        """Raise AssertionError unless each job is in its place, and all of them are counted."""
        assert self._queue.keys() == {job for jobs in self._queued.values() for job in jobs}
        assert all(job.key == key for key, jobs in self._queued.items() for job in jobs)
        assert all(self._queued.values())
        slots = [job.slot for jobs in (self._queue, self._begun, *self._struck) for job in jobs]
        slots += [slot for commit in self._adding for _, slot in commit.left]
        assert self.queued_bytes == sum(slot.nbytes for slot in slots)

    def _skipped(self, count: int, why: str) -> None:
        if count:
            name = self.backing.name
            self._counters.add("write_behind_skipped_total", count, tier=name, why=why)

    def _strike_some(self) -> None:
        left = STRIKE_SLICE
        while self._struck and left:
            struck = self._struck[0]
            for _ in range(min(len(struck), left)):
                job, _ = struck.popitem(last=False)
                self._settle(job)
                self._let_go(job)
                left -= 1
            if not struck:
                self._struck.popleft()

    async def _strike_rest(self) -> None:
        while self._struck:
            await asyncio.sleep(0)
            self._strike_some()
        self._striking = False

    def flush(self) -> asyncio.Future[None]:
        """Done once what is queued now has been written, or given up."""
        self._enqueue_all()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._jobs:
            self._flushes.append((set(self._jobs), done))
        else:
            done.set_result(None)
        return done

    async def _write(self) -> None:
        given_up = False

        def give_up() -> None:
            # Its thread may still read the slot, so that stays withheld; all else goes on without.
            nonlocal given_up
            given_up = True
            self._num_writers -= 1
            self._settle(job)
            self.forget(None)

        try:
            while self._queue and not given_up:
                job = self._next()
                self._begun.add(job)
                try:
                    await self._write_one(job, give_up)
                except Exception as error:
                    report_bug(self._counters, "a write", error)
                finally:
                    self._begun.discard(job)
                    self._settle(job)
                    self._let_go(job)
        finally:
            self._num_writers -= not given_up

    def _next(self) -> _Job:
        """Take the next job out of the queue."""
        job, _ = self._queue.popitem(last=False)
        same = self._queued[job.key]
        same.remove(job)
        if not same:
            del self._queued[job.key]
        return job

    async def _write_one(self, job: _Job, give_up: Callable[[], None]) -> None:
        slot, commit = job.slot, job.commit
        spared = slot.state is not SlotState.READY or await self._is_spared(job)
        if not spared and not job.forgotten:
            view = self._host.pool.view(slot.offset, slot.nbytes)
            try:
                if await self.backing.write(job.key, view, commit.origin, give_up):
                    commit.nbytes += slot.nbytes
            except CorruptObject as error:
                self._reject(job, error)
        if commit.num_left == 1:
            prefix = commit.origin.prefix
            # Tails before heads: what is used last is evicted last.
            for stop in range(len(prefix), 0, -TOUCH_SLICE):
                self.backing.written(prefix[max(0, stop - TOUCH_SLICE) : stop])
                if stop > TOUCH_SLICE:
                    await asyncio.sleep(0)

    async def _is_spared(self, job: _Job) -> bool:
        """Whether others have written it already; asked once for a whole commit."""
        commit = job.commit
        if not self.backing.must_be_asked:
            return False
        if commit.spared is None:
            asking = self.backing.spared(commit.keys, commit.origin)
            commit.spared = asyncio.ensure_future(asking)
        spared = job.key in await asyncio.shield(commit.spared)
        self._skipped(spared, "there")
        return spared

    def _reject(self, job: _Job, error: CorruptObject) -> None:
        """The slot does not hold what its writer made a checksum of: nobody may have it."""
        key, part = job.key, job.commit.origin.part
        logger.error("host: object %s is rejected: %s", identity(key, part).hex(), error)
        self._counters.add("corrupt_objects_total", tier="host")
        if self._host.get(key, part) is job.slot:
            self._host.drop_object(key, part, Cause.CORRUPT)

    def _settle(self, job: _Job) -> None:
        """Nobody need wait for a job any more; repeatable."""
        if job not in self._jobs:
            return
        self._jobs.discard(job)
        commit = job.commit
        commit.num_left -= 1
        if commit.span is not None and not commit.num_left:
            commit.span.end(objects=len(commit.keys), bytes=commit.nbytes)
        for jobs, done in self._flushes:
            jobs.discard(job)
            if not jobs and not done.done():
                done.set_result(None)
        self._flushes = [flush for flush in self._flushes if flush[0]]

    def _let_go(self, job: _Job) -> None:
        """No thread reads a job's slot any more."""
        self.queued_bytes -= job.slot.nbytes
        self._host.unhold(job.slot)
