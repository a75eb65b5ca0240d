"""A slower tier as the node runs it: its index, its threads, its byte budget and its health.

The tier itself only stores bytes. Here every read is verified, every failure becomes a counted
miss, and a tier that fails is left alone for a while. Work runs in the tier's own threads, so a
tier that hangs loses those and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvstrata.errors import CorruptObject, Incompatible, TierFull, TierUnavailable
from kvstrata.node.index import Index
from kvstrata.objects import ObjectHeader, object_id, split_object_id, verify_object
from kvstrata.observe.counters import Counters
from kvstrata.policies.base import Policy
from kvstrata.tiers.base import Found, Outcome, Tier

logger = logging.getLogger(__name__)

R = TypeVar("R")

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
SCAN_SLICE = 256


def identity(key: bytes, part: int) -> bytes:
    """The object id of one part of a chunk."""
    return object_id(key, part >> 16, part & 0xFFFF)


class Backing:
    """One slower tier in the node's service; lives on the node's loop.

    Args:
        tier: where the objects are.
        capacity_bytes: the hard bound on what it may hold.
        policy: orders its chunks for eviction.
        num_threads: threads for reads, and as many for writes.
        deadline_s: a tier that completes no read for this long is taken as hung.
        counters: the node's.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        tier: Tier,
        capacity_bytes: int,
        policy: Policy,
        *,
        num_threads: int,
        deadline_s: float,
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        self.tier = tier
        self.name = tier.name
        self.index: Index[int] = Index(capacity_bytes, policy, int)
        self.deadline_s = deadline_s
        self.num_threads = num_threads
        self.last_progress = clock()
        self.scanned = False
        self._counters = counters
        self._clock = clock
        self._readers = ThreadPoolExecutor(num_threads, f"kvstrata-{self.name}-read")
        self._writers = ThreadPoolExecutor(num_threads, f"kvstrata-{self.name}-write")
        self._off_until = self._full_until = 0.0
        self._backoff_s = FIRST_BACKOFF_S
        self._trouble = ""
        self._used: dict[bytes, int] = {}
        self._clears = 0

    @property
    def readable(self) -> bool:
        """Whether the tier is asked at all now."""
        return self._clock() >= self._off_until

    @property
    def writable(self) -> bool:
        """Whether the tier takes new objects now."""
        return self.readable and self._clock() >= self._full_until

    @property
    def state(self) -> str:
        """In a word or a sentence, how the tier is."""
        if not self.readable:
            return f"off: {self._trouble}"
        if not self.writable:
            return f"read only: {self._trouble}"
        return "ok" if self.scanned else "scanning"

    async def read(self, key: bytes, part: int, nbytes: int, into: memoryview) -> ObjectHeader | None:
        """Read one object and verify it; None when it cannot be had. Counts what went wrong."""
        name = identity(key, part)

        def work() -> tuple[Outcome, ObjectHeader | None]:
            (outcome,) = self.tier.read([name], [into])
            return outcome, verify_object(into, name) if outcome is Outcome.HIT else None

        try:
            outcome, header = await self._run(self._readers, work)
        except (CorruptObject, Incompatible) as error:
            logger.error("%s: object %s is rejected: %s", self.name, name.hex(), error)
            self._counters.add("corrupt_objects_total", tier=self.name)
            await self._take_out(key, part, name)
            return None
        except TierUnavailable as error:
            self.trip(error)
            return None
        self.last_progress = self._clock()
        self._counters.add("tier_reads_total", tier=self.name, outcome=outcome.value)
        if outcome is Outcome.HIT:
            self._backoff_s = FIRST_BACKOFF_S
            self._counters.add("tier_read_bytes_total", nbytes, tier=self.name)
            self._used[key] = part
            return header
        if outcome is Outcome.FAILED:
            await self._take_out(key, part, name)
        elif self.index.get(key, part) is not None:
            self.index.pop(key, part)
        return None

    async def write(self, key: bytes, part: int, data: memoryview, cost: float) -> bool:
        """Store one object within the byte budget, evicting what it must; False if it could not."""
        if not self.writable or not await self._make_room(len(data)):
            return False
        name, clears = identity(key, part), self._clears
        older = self.index.get(key, part)
        try:
            if older is not None and older != len(data):
                await self._delete([(key, part, older)])
            (outcome,) = await self._run(self._writers, lambda: self.tier.write([(name, data)]))
        except TierUnavailable as error:
            self.index.unclaim(len(data))
            self.trip(error)
            return False
        self._counters.add("tier_writes_total", tier=self.name, outcome=outcome.value)
        if outcome is not Outcome.HIT or clears != self._clears:
            self.index.unclaim(len(data))
            return False
        self._counters.add("tier_write_bytes_total", len(data), tier=self.name)
        self.index.put(key, part, len(data), cost)
        return True

    async def scan(self) -> None:
        """Enter what an earlier process left, in slices, while requests are served."""
        loop = asyncio.get_running_loop()
        batches = self.tier.scan()
        doomed: list[tuple[bytes, int, int]] = []
        try:
            while batch := await loop.run_in_executor(self._writers, lambda: next(batches, None)):
                for start in range(0, len(batch), SCAN_SLICE):
                    for found in batch[start : start + SCAN_SLICE]:
                        self._enter(found, doomed)
                    await asyncio.sleep(0)
        except TierUnavailable as error:
            self.trip(error)
        self.scanned = True
        if doomed:
            await self._delete(doomed)
        logger.info("%s: %d objects, %d bytes", self.name, self.index.num_objects,
                    self.index.used_bytes)  # fmt: skip

    async def clear(self) -> int:
        """Forget everything, also for a later process; returns the number of objects."""
        count = self.index.num_objects
        self._clears += 1
        for key in list(self.index.keys()):
            self.index.pop_chunk(key)
        try:
            await self._run(self._writers, self.tier.clear)
        except TierUnavailable as error:
            self.trip(error)
        return count

    async def drop(self, keys: list[bytes]) -> int:
        """Forget these chunks."""
        doomed = [
            (key, part, nbytes) for key in keys for part, nbytes in self.index.pop_chunk(key)
        ]
        for _, _, nbytes in doomed:
            self.index.claim(nbytes)
        try:
            await self._delete(doomed)
        except TierUnavailable as error:
            self.trip(error)
        return len(doomed)

    async def reject(self, key: bytes, part: int) -> None:
        """Take a corrupt object out of service."""
        await self._take_out(key, part, identity(key, part))

    async def note_use(self) -> None:
        """Tell the tier what was used since the last call."""
        used, self._used = self._used, {}
        if used and self.readable:
            names = [identity(key, part) for key, part in used.items()]
            try:
                await self._run(self._writers, lambda: self.tier.touch(names))
            except TierUnavailable as error:
                self.trip(error)

    def trip(self, error: Exception) -> None:
        """Leave the tier alone for a while: off, or read only when it is merely full."""
        until = self._clock() + self._backoff_s
        self._trouble = str(error)
        if isinstance(error, TierFull):
            self._full_until = until
            what = "takes no writes"
        else:
            self._off_until = until
            what = "is off"
        self._counters.add("tier_trips_total", tier=self.name)
        logger.error("%s %s for %.0f s: %s", self.name, what, self._backoff_s, error)
        self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)

    def close(self) -> None:
        """Release the tier; threads that hang are left behind."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._writers.shutdown(wait=False, cancel_futures=True)
        self.tier.close()

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    async def _make_room(self, nbytes: int) -> bool:
        if nbytes > self.index.capacity_bytes:
            return False
        while not self.index.claim(nbytes):
            victim = self.index.victim(lambda _: True)
            if victim is None:
                return False
            self._counters.add("evicted_chunks_total", tier=self.name)
            await self.drop([victim])
            if not self.writable:
                return False
        return True

    async def _delete(self, doomed: list[tuple[bytes, int, int]]) -> None:
        """Delete objects whose bytes are claimed; those that stay keep their claim."""
        names = [identity(key, part) for key, part, _ in doomed]
        outcomes = await self._run(self._writers, lambda: self.tier.delete(names))
        for (_, _, nbytes), outcome in zip(doomed, outcomes, strict=True):
            if outcome is not Outcome.FAILED:
                self.index.unclaim(nbytes)

    async def _take_out(self, key: bytes, part: int, name: bytes) -> None:
        self.index.pop(key, part)
        try:
            await self._run(self._writers, lambda: self.tier.reject([name]))
        except TierUnavailable as error:
            self.trip(error)

    def _enter(self, found: Found, doomed: list[tuple[bytes, int, int]]) -> None:
        key, group, rank = split_object_id(found.object_id)
        part = group << 16 | rank
        if self.index.get(key, part) is not None:
            return
        while not self.index.claim(found.nbytes):
            victim = self.index.victim(lambda _: True)
            if victim is None:
                # A smaller budget than last time: what does not fit goes.
                doomed.append((key, part, 0))
                return
            doomed.extend((victim, p, 0) for p, _ in self.index.pop_chunk(victim))
        self.index.put(key, part, found.nbytes)
