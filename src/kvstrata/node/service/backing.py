"""A slower tier as the node runs it: its index, its threads, its byte budget and its health.

The tier itself only stores bytes. Here every read is verified, every failure becomes a counted
miss, and a tier that fails is left alone for a while. Work runs in the tier's own threads, so a
tier that hangs loses those and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from blake3 import blake3

from kvstrata.errors import (
    CorruptObject,
    Incompatible,
    TierFull,
    TierUnavailable,
    UsageError,
)
from kvstrata.node.coding.choosing import Choice
from kvstrata.node.coding.recoding import Encoded, encoded_object, restored_object, stamped
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.common.background import report_bug
from kvstrata.node.common.backoff import Backoff
from kvstrata.node.common.index import Index
from kvstrata.node.service.bandwidth import Bandwidth
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.removals import ORDER_MASK, Removals
from kvstrata.objects import (
    HEADER_BYTES,
    ObjectHeader,
    split_object_id,
    verify_object,
)
from kvstrata.observe.counters import Counters
from kvstrata.parts import at_level, identity, order_name
from kvstrata.policies.base import Policy
from kvstrata.quality.choice import Place
from kvstrata.tiers.base import Found, Outcome, OwnedTier, Put

logger = logging.getLogger(__name__)

HIT = Outcome.HIT

SCAN_SLICE = 256
UNKNOWN_S = 1.0
"""What computing a chunk is taken to cost, for the choice of a codec, where nobody has said."""
PROBE_BYTES, PROBE_READS = 1 << 20, 16
PROBE_KEY = blake3(b"kvstrata probe").digest()
"""Of an object of no chunk; one that a node left which ended meanwhile goes at the next scan."""


class _Write:
    """A write under way; no longer wanted once its chunk is cleared."""

    __slots__ = ("key", "wanted")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.wanted = True


class Backing:
    """One slower tier in the node's service; lives on the node's loop.

    Args:
        tier: where the objects are.
        capacity_bytes: the hard bound on what it may hold.
        policy: orders its chunks for eviction.
        num_threads: threads for reads, and as many for writes.
        choice: how new objects are stored, where that makes them smaller; None: as they are.
        coarser: how coarser copies of them are stored besides, finest first.
        load_target_s: within it a request's load should end; coarser copies are read for it, or
            the load ends early. 0: loads take what they take.
        queue_bytes: what may wait to be written; beyond it stores skip this tier.
        deadline_s: a tier that completes no read for this long is taken as hung.
        counters: the node's.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        tier: OwnedTier,
        capacity_bytes: int,
        policy: Policy,
        *,
        num_threads: int,
        queue_bytes: int,
        deadline_s: float,
        counters: Counters,
        clock: Callable[[], float],
        choice: Choice | None = None,
        coarser: Sequence[Choice] = (),
        load_target_s: float = 0.0,
    ) -> None:
        self.tier = tier
        self.name = tier.name
        # An entry is the object's size plus the number of its byte order, 0 while unknown.
        self.index: Index[int] = Index(capacity_bytes, policy, lambda entry: entry & ~ORDER_MASK)
        self.capacity_bytes = capacity_bytes
        self.num_threads = num_threads
        self.choice = choice
        self.coarser = coarser
        self.load_target_s = load_target_s
        self.bandwidth = Bandwidth(clock)
        self.queue_bytes = queue_bytes
        self._counters = counters
        self._clock = clock
        self._scratch = Scratch(2 * num_threads)
        self._pages = Scratch(num_threads)
        self._calls = TierCalls(
            self.name, num_threads, deadline_s, counters=counters, clock=clock, trip=self.trip
        )
        self._scanned = asyncio.Event()
        self._off = Backoff(clock)
        self._full = Backoff(clock)
        self._trouble = ""
        self._orders: dict[str, int] = {}
        self._writes: set[_Write] = set()
        self._removals = Removals(self.index, self._calls, self.trip)
        self._forgotten: set[bytes] = set()
        self._used: dict[bytes, int] = {}  # the number of each key's last use
        self._uses = itertools.count()
        self._clears = 0
        self._timed = False

    def place(self) -> Place | None:
        """What the choice of a codec depends on; None while the tier's speed is not known."""
        speed, cores = self.bandwidth.bytes_per_s, min(self.num_threads, os.cpu_count() or 1)
        if not self._timed or not speed:
            return None
        return Place(self.name, self.index.capacity_bytes, speed, cores)

    @property
    def readable(self) -> bool:
        """Whether the tier is asked at all now."""
        return not self._off.left_s

    @property
    def writable(self) -> bool:
        """Whether the tier takes new objects now; they may still wait for the scan to end."""
        return self.readable and not self._full.left_s and not self.tier.read_only_reason

    @property
    def state(self) -> str:
        """In a word or a sentence, how the tier is."""
        if not self.readable:
            return f"off: {self._trouble}"
        if not self.writable:
            return f"read only: {self.tier.read_only_reason or self._trouble}"
        return "ok" if self._scanned.is_set() else "scanning"

    def find(self, key: bytes, part: int, orders: Iterable[str] | None) -> int | None:
        """Size of an object that can be asked for now; None if it is absent.

        One known to be in none of these byte orders (None: any will do) counts as absent too. Of
        what a scan found the order is unknown until it is read.
        """
        entry = self.index.get(key, part) if self.readable else None
        if entry is None:
            return None
        order = entry & ORDER_MASK
        if order and orders is not None and all(self._orders.get(o) != order for o in orders):
            return None
        return entry & ~ORDER_MASK

    def sizes(self, key: bytes, part: int) -> list[float]:
        """Size of an object at each level, the object itself first; `inf` where there is none."""
        parts = [at_level(part, level) for level in range(1 + len(self.coarser))]
        return [self.find(key, one, None) or math.inf for one in parts]

    def use(self, keys: list[bytes]) -> None:
        """Note the use of a prefix, given head first."""
        self.index.touch(keys)
        self._used.update(zip(reversed(keys), self._uses, strict=False))

    async def read(
        self,
        key: bytes,
        part: int,
        nbytes: int,
        into: memoryview,
        give_up: Callable[[], None] = lambda: None,
    ) -> ObjectHeader | None:
        """Read one object into a slot, raw and verified; None when it cannot be had.

        Counts what went wrong. Returns only when no thread touches ``into`` any more; ``give_up``
        is called before, when the deadline passes.

        Args:
            key: of the chunk.
            part: which of the chunk's objects.
            nbytes: its size in this tier, as `find` said.
            into: the slot, as long as the object is when it is raw.
            give_up: says that the slot will not be filled in time.
        """
        name = identity(key, part)

        def work() -> tuple[Outcome, ObjectHeader | None]:
            if nbytes == len(into):
                outcome = self._fetch(name, into)
                return outcome, restored_object(into, name, into) if outcome is HIT else None
            with self._scratch.buffer(nbytes) as stored:
                outcome = self._fetch(name, stored)
                return outcome, restored_object(stored, name, into) if outcome is HIT else None

        return await self._read(key, part, nbytes, work, give_up)

    async def verify(self, key: bytes, part: int, nbytes: int, into: memoryview) -> None:
        """Read one object as it is stored, to see whether it is still good; see `read`."""
        name = identity(key, part)

        def work() -> tuple[Outcome, ObjectHeader | None]:
            outcome = self._asked(name, into)  # alone, so it says nothing of the link
            return outcome, verify_object(into, name) if outcome is HIT else None

        await self._read(key, part, nbytes, work, lambda: None)

    async def _read(
        self,
        key: bytes,
        part: int,
        nbytes: int,
        work: Callable[[], tuple[Outcome, ObjectHeader | None]],
        give_up: Callable[[], None],
    ) -> ObjectHeader | None:
        name = identity(key, part)
        try:
            outcome, header = await self._calls.read(work, give_up)
        except (CorruptObject, Incompatible) as error:
            logger.error("%s: object %s is rejected: %s", self.name, name.hex(), error)
            self._counters.add("corrupt_objects_total", tier=self.name)
            if self._has(key, part, nbytes):
                self._removals.condemn(key, part)
                await self._removals.run(self.tier.reject, (key, part))
            return None
        except UsageError as error:
            logger.warning("%s: object %s is not for this reader: %s", self.name, name.hex(), error)
            return None
        except TierUnavailable as error:
            self.trip(error)
            return None
        self._counters.add("tier_reads_total", tier=self.name, outcome=outcome.value)
        if header is not None:
            if self.readable:
                self._off.worked()
            self._counters.add("tier_read_bytes_total", nbytes, tier=self.name)
            if self.index.get(key, part) == nbytes:  # of an order not known yet
                self.index.amend(key, part, nbytes | self._order(header.kind, header.order))
        elif not self._has(key, part, nbytes):
            pass  # replaced meanwhile, by one of another size: that one is none of this read's
        elif outcome is Outcome.FAILED:
            # It must not stand in the way of a fresh copy.
            self._removals.condemn(key, part)
            await self._removals.run(self.tier.delete)
        else:
            self.index.pop(key, part)
        return header

    async def write(self, key: bytes, data: memoryview, origin: Origin) -> bool:
        """Store one object within the byte budget, evicting what it must; False if it could not.

        Waits for the scan: before its end nobody knows what the tier holds already.

        Args:
            key: of the chunk.
            data: header page and payload, kept still by the caller.
            origin: what is known of its commit.
        """
        writing = _Write(key)
        self._writes.add(writing)
        try:
            await self._scanned.wait()
            stored = await self._write(writing, data, origin, self.choice, 0)
            for level, codec in enumerate(self.coarser, 1):
                if stored:
                    await self._write(writing, data, origin, codec, level)
        finally:
            self._writes.discard(writing)
        return stored

    async def _write(
        self,
        writing: _Write,
        data: memoryview,
        origin: Origin,
        choice: Choice | None,
        level: int,
    ) -> bool:
        if not self.writable:
            return False
        key, part, order = writing.key, at_level(origin.part, level), origin.order
        encoded = await self._encoded(choice, data, origin, level)
        if encoded is not None:
            data, order = encoded.data, order_name(encoded.header.kind, encoded.header.order)
        elif level:
            return False  # no smaller, or nothing for this codec: the object itself has to do
        try:
            nbytes = len(data)
            if not await self._make_room(nbytes):
                return False
            outcome = Outcome.MISS
            try:
                if writing.wanted:
                    name = identity(key, part)
                    outcome = await self._calls.call(lambda: self._put(name, data))
            except TierUnavailable as error:
                self.trip(error)
            if outcome is not Outcome.HIT:
                self.index.unclaim(nbytes)
                self._counters.add("tier_writes_total", tier=self.name, outcome="failed")
                return False
            self._full.worked()
            self._removals.replaced(key, part)
            if not writing.wanted:
                self._removals.add(key, part, nbytes)
                await self._removals.run(self.tier.delete)
                return False
        except asyncio.CancelledError:
            encoded = None  # a thread may still read its buffer
            raise
        finally:
            if encoded is not None:
                self._scratch.give(encoded.buffer)
        self._counters.add("tier_writes_total", tier=self.name, outcome="hit")
        self._counters.add("tier_write_bytes_total", nbytes, tier=self.name)
        self.index.put(key, part, nbytes | self._order_number(order), origin.cost)
        return True

    async def scan(self) -> None:
        """Enter what an earlier process left, in slices, while requests are served.

        A tier that fails meanwhile is scanned again when it is back.
        """
        while True:
            try:
                await self._scan()
                break
            except TierUnavailable as error:
                self.trip(error)
                await asyncio.sleep(self._off.left_s)
        self._forgotten.clear()
        await self._removals.run(self.tier.delete)
        self._scanned.set()
        logger.info("%s: %d objects, %d bytes", self.name, self.index.num_objects,
                    self.index.used_bytes)  # fmt: skip
        if self.load_target_s or (self.choice is not None and self.choice.needs_speed):
            await self._probe()
        self._timed = True

    def clear(self) -> Awaitable[int]:
        """Forget everything, now; the answer, once later processes forget it too: how many objects.

        Awaiting it raises:
            TierUnavailable: nothing is served any more, but a later process may find it.
        """
        count = self.index.num_objects
        self._clears += 1
        for write in self._writes:
            write.wanted = False
        held = self.index.used_bytes - self.index.claimed_bytes
        return self._clear_tier(self.index.clear(), count, held)

    def drop(self, keys: Iterable[bytes]) -> Awaitable[int]:
        """Forget these chunks, now; the answer, once they are deleted: how many objects.

        Awaiting it raises:
            TierUnavailable: they are not served any more, but a later process may find them.
        """
        gone = set(keys)
        for write in self._writes:
            write.wanted = write.wanted and write.key not in gone
        if not self._scanned.is_set():
            self._forgotten |= gone
        return self._delete_doomed(sum(self._removals.condemn_chunk(key) for key in gone))

    async def note_use(self) -> None:
        """Tell the tier what was used since the last call, tails of a prefix first."""
        used, self._used = self._used, {}
        names = [
            identity(key, part)
            for key in sorted(used, key=used.__getitem__)
            for part, _ in self.index.objects(key)
        ]
        if names and self.readable:
            try:
                await self._calls.call(lambda: self.tier.touch(names))
            except TierUnavailable as error:
                self.trip(error)

    def trip(self, error: Exception) -> None:
        """Leave the tier alone for a while: off, or read only when it is merely full."""
        full = isinstance(error, TierFull)
        backoff = self._full if full else self._off
        if backoff.begin():
            self._trouble = str(error)
            self._counters.add("tier_trips_total", tier=self.name)
            what = "takes no writes" if full else "is off"
            logger.error("%s %s for %.0f s: %s", self.name, what, backoff.left_s, error)

    def close(self) -> None:
        """Release the tier; threads that hang are left behind."""
        self._calls.close()
        self.tier.close()

    async def _encoded(
        self, choice: Choice | None, data: memoryview, origin: Origin, level: int
    ) -> Encoded | None:
        """The object as this tier stores it; None where it stays as it is."""
        if choice is None:
            return None

        place = self.place()

        def work() -> Encoded | None:
            codec = choice.of(origin.weights, (origin.cost or UNKNOWN_S) / len(data), place)
            if codec is None:
                return None
            return encoded_object(codec, data, self._scratch, level)

        try:
            encoded = await asyncio.wrap_future(self._calls.submit(work))
        except Exception as error:
            report_bug(self._counters, f"codec {choice.name}", error)
            return None
        if encoded is not None:
            stored = len(encoded.data)
            self._counters.add("encoded_bytes_total", len(data), tier=self.name, of="raw")
            self._counters.add("encoded_bytes_total", stored, tier=self.name, of="stored")
        return encoded

    def _fetch(self, name: bytes, into: memoryview) -> Outcome:
        """Read one object as it is stored, and measure how fast that goes."""
        brought = 0
        self.bandwidth.begin()
        try:
            outcome = self._asked(name, into)
            brought = len(into) if outcome is HIT else 0
        finally:
            self.bandwidth.end(brought)
        return outcome

    def _asked(self, name: bytes, into: memoryview) -> Outcome:
        (answer,) = self.tier.read([name], [into])
        if isinstance(answer, Outcome):
            return answer
        return HIT if answer == len(into) else Outcome.FAILED  # replaced by a shorter one

    def _put(self, name: bytes, data: memoryview) -> Outcome:
        """Write one object, under this tier's own epoch."""
        with self._pages.buffer(HEADER_BYTES) as page:
            page[:] = stamped(data[:HEADER_BYTES], self.tier.epoch)
            (outcome,) = self.tier.write([Put(name, page, data[HEADER_BYTES:])])
        return outcome

    async def _probe(self) -> None:
        """Read a little in all threads, to know how fast the tier is before it matters.

        Objects that are there, or one of no chunk where they are few and small.
        """
        known = [
            (identity(key, part), entry & ~ORDER_MASK)
            for key in itertools.islice(self.index.keys(), PROBE_READS)
            for part, entry in self.index.objects(key)
        ][:PROBE_READS]
        few = sum(nbytes for _, nbytes in known) < PROBE_READS * PROBE_BYTES // 4
        room = self.index.used_bytes + 4 * PROBE_BYTES <= self.index.capacity_bytes
        try:
            if few and room and self.writable and self.index.claim(PROBE_BYTES):
                name = identity(PROBE_KEY, 0)
                try:
                    with self._scratch.buffer(PROBE_BYTES) as data:
                        data[:] = os.urandom(PROBE_BYTES)
                        put = Put(name, data[:HEADER_BYTES], data[HEADER_BYTES:])
                        await self._calls.call(lambda: self.tier.write([put]))
                    await self._read_aside([(name, PROBE_BYTES)] * PROBE_READS)
                finally:
                    # It counts until it is gone.
                    self._removals.add(PROBE_KEY, 0, PROBE_BYTES)
                await self._removals.run(self.tier.delete)
            else:
                await self._read_aside(known)
        except TierUnavailable as error:
            self.trip(error)

    async def _read_aside(self, objects: list[tuple[bytes, int]]) -> None:
        """Read these side by side, for the time that it takes."""

        def work(name: bytes, nbytes: int) -> None:
            with self._scratch.buffer(nbytes) as into:
                self._fetch(name, into)

        reads = [self._calls.read(partial(work, *one), lambda: None) for one in objects]
        for failure in await asyncio.gather(*reads, return_exceptions=True):
            if failure is not None:
                raise failure

    async def _clear_tier(
        self, chunks: dict[bytes, tuple[object, ...]], count: int, held: int
    ) -> int:
        try:
            await self._calls.call(self.tier.clear)
        except TierUnavailable as error:
            for key, flat in chunks.items():
                for part, entry in zip(flat[::2], flat[1::2], strict=True):
                    assert isinstance(part, int)
                    assert isinstance(entry, int)
                    self._removals.add(key, part, entry & ~ORDER_MASK)
            self.trip(error)
            raise
        self.index.unclaim(held)
        return count

    async def _delete_doomed(self, count: int) -> int:
        if count and not await self._removals.run(self.tier.delete):
            raise TierUnavailable(f"{self.name}: not all of it could be deleted: {self._trouble}")
        return count

    async def _make_room(self, nbytes: int) -> bool:
        """Claim bytes, evicting what it takes; False if they cannot be had."""
        if nbytes > self.index.capacity_bytes:
            return False
        while not self.index.claim(nbytes):
            victim = self.index.victim(lambda _: True)
            if victim is not None:
                self._counters.add("evicted_chunks_total", tier=self.name)
                self._removals.condemn_chunk(victim)
            elif not self._removals:
                return False
            if not await self._removals.run(self.tier.delete):
                return False
        return True

    def _has(self, key: bytes, part: int, nbytes: int) -> bool:
        entry = self.index.get(key, part)
        return entry is not None and entry & ~ORDER_MASK == nbytes

    async def _scan(self) -> None:
        clears = self._clears
        batches = self.tier.scan()
        while (batch := await self._calls.call(lambda: next(batches, None))) is not None:
            for start in range(0, len(batch), SCAN_SLICE):
                for found in batch[start : start + SCAN_SLICE]:
                    await self._enter(found, clears)
                await asyncio.sleep(0)

    async def _enter(self, found: Found, clears: int) -> None:
        """Index what a scan found that began after so many clears, or see to its removal."""
        key, group, rank = split_object_id(found.object_id)
        part = group << 16 | rank
        if self.index.get(key, part) is not None or (key, part) in self._removals:
            return

        def wanted() -> bool:
            return clears == self._clears and key not in self._forgotten and key != PROBE_KEY

        room = wanted() and (self.index.claim(found.nbytes) or await self._make_room(found.nbytes))
        if room and wanted():
            self.index.put(key, part, found.nbytes)
            return
        # Cleared while the scan ran, or beyond a budget smaller than last time's.
        if not room:
            self.index.claim_existing(found.nbytes)
        self._removals.add(key, part, found.nbytes)

    def _order(self, kind: str, order: str) -> int:
        return self._order_number(order_name(kind, order))

    def _order_number(self, order: str) -> int:
        if not order or len(self._orders) >= ORDER_MASK:
            return self._orders.get(order, 0)
        return self._orders.setdefault(order, len(self._orders) + 1)
