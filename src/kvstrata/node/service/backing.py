"""A slower tier as the node runs it: what holds for every one, whoever else writes to it.

The tier itself only stores bytes. Here every call has a deadline, every read is verified, objects
are encoded and decoded on their way, every failure becomes a counted miss, and a tier that fails
is left alone for a while. What the tier holds, and how one knows, is a subclass's.
"""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence

from kvstrata.errors import CorruptObject, Incompatible, TierUnavailable, UsageError
from kvstrata.node.coding.choosing import Choice
from kvstrata.node.coding.recoding import Encoded, encoded_object, restored_object, stamped
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.common.background import Tasks, report_bug
from kvstrata.node.service.bandwidth import Bandwidth
from kvstrata.node.service.calls import TierCalls, nothing
from kvstrata.node.service.health import Health
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.turns import Turns
from kvstrata.objects import HEADER_BYTES, ObjectHeader, verify_object
from kvstrata.observe.counters import Counters
from kvstrata.parts import at_level, identity
from kvstrata.quality.choice import Place
from kvstrata.tiers.base import Outcome, Put, Store

logger = logging.getLogger(__name__)

HIT = Outcome.HIT

UNKNOWN_S = 1.0
"""What computing a chunk is taken to cost, for the choice of a codec, where nobody has said."""


class Backing(ABC):
    """One slower tier in the node's service; lives on the node's loop.

    Args:
        store: where the objects are.
        num_threads: threads for reads, and as many for writes; for encoding see `TierCalls`.
        choice: how new objects are stored, where that makes them smaller; None: as they are.
        coarser: how coarser copies of them are stored besides, finest first.
        load_target_s: within it a request's load should end; coarser copies are read for it, or
            the load ends early. 0: loads take what they take.
        queue_bytes: what may wait to be written; beyond it stores skip this tier.
        deadline_s: a tier that completes no call of a kind for this long is taken as hung.
        counters: the node's.
        clock: monotonic seconds.
    """

    capacity_bytes: int

    def __init__(
        self,
        store: Store,
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
        limits = store.limits
        self.name = store.name
        self.num_threads = max(1, min(num_threads, limits.concurrency // 2))
        self.choice = choice
        self.coarser = coarser
        self.load_target_s = load_target_s
        self.bandwidth = Bandwidth(clock)
        self.queue_bytes = queue_bytes
        self.tier = store
        self._counters = counters
        self._scratch = Scratch(2 * self.num_threads)
        self._pages = Scratch(self.num_threads)
        self._health = Health(self.name, counters, clock, self._when_off)
        self._calls = TierCalls(
            self.name, self.num_threads, min(deadline_s, limits.timeout_s),
            counters=counters, clock=clock, trip=self.trip,
        )  # fmt: skip
        self._turns = Turns()
        self._tasks = Tasks(counters)

    # what it holds

    @abstractmethod
    def find(self, key: bytes, part: int, orders: Iterable[str] | None) -> int | None:
        """Size of an object that can be asked for now; None if it is absent.

        One known to be in none of these byte orders (None: any will do) counts as absent too.
        """

    @abstractmethod
    def cost_of(self, key: bytes) -> float:
        """What computing a chunk takes, as far as the tier minds it, in seconds; 0: unknown."""

    @abstractmethod
    def use(self, keys: list[bytes]) -> None:
        """Note the use of a prefix, given head first."""

    @abstractmethod
    def written(self, prefix: list[bytes]) -> None:
        """Hear that all objects of a commit have been written, or given up."""

    @abstractmethod
    async def write(
        self, key: bytes, data: memoryview, origin: Origin, give_up: Callable[[], None] = nothing
    ) -> bool:
        """Store one object; False if it could not. Returns only when no thread reads ``data``.

        Args:
            key: of the chunk.
            data: header page and payload, kept still by the caller.
            origin: what is known of its commit.
            give_up: is called before, when the deadline passes.
        Raises:
            CorruptObject: ``data`` is not what its writer made a checksum of.
        """

    @abstractmethod
    def clear(self) -> Awaitable[int]:
        """Forget everything, now; the answer, once later processes forget it too: how many objects.

        Awaiting it raises:
            TierUnavailable: nothing is served any more, but a later process may find it.
        """

    @abstractmethod
    def drop(self, keys: Iterable[bytes]) -> Awaitable[int]:
        """Forget these chunks, now; the answer, once they are deleted: how many objects.

        Awaiting it raises:
            TierUnavailable: they are not served any more, but a later process may find them.
        """

    @abstractmethod
    def _seen(self, key: bytes, part: int) -> int | None:
        """What tells the object that is there now from all others of its name."""

    @abstractmethod
    def _reject(self, key: bytes, part: int, seen: int | None) -> None:
        """Take an object out of service that was read and found corrupt, if it is still there."""

    @abstractmethod
    def _leave(self, key: bytes, part: int, seen: int | None) -> None:
        """An object was read that this release does not know: absent, but for its bytes."""

    @abstractmethod
    def _missed(self, key: bytes, part: int, seen: int | None, outcome: Outcome) -> None:
        """An object could not be read: it was not there, or the tier failed with it."""

    @abstractmethod
    def _learn(self, key: bytes, part: int, header: ObjectHeader) -> None:
        """An object was read; this is its header, as it is raw."""

    @abstractmethod
    def _when_off(self) -> None:
        """The tier has just been switched off for a while."""

    # how it is

    @property
    def readable(self) -> bool:
        """Whether the tier is asked at all now."""
        return not self._health.off_s

    @property
    def writable(self) -> bool:
        """Whether the tier takes new objects now."""
        return self.readable and not self._health.full and not self._calls.stuck

    @property
    def state(self) -> str:
        """In a word or a sentence, how the tier is."""
        if not self.readable:
            return f"off: {self._health.trouble}"
        return "ok" if self.writable else f"read only: {self._health.trouble}"

    @property
    def scratch_bytes(self) -> int:
        """Memory of the buffers in use, and of those kept for the next use."""
        return self._scratch.nbytes + self._pages.nbytes

    def place(self) -> Place | None:
        """What the choice of a codec depends on; None while the tier's speed is not known."""
        speed, cores = self.bandwidth.bytes_per_s, min(self.num_threads, os.cpu_count() or 1)
        return Place(self.name, self.capacity_bytes, speed, cores) if speed else None

    def sizes(self, key: bytes, part: int) -> list[float]:
        """Size of an object at each level, the object itself first; `inf` where there is none."""
        parts = [at_level(part, level) for level in range(1 + len(self.coarser))]
        return [self.find(key, one, None) or math.inf for one in parts]

    def trip(self, error: Exception) -> None:
        """Leave the tier alone for a while: off, or read only when it is merely full."""
        self._health.trip(error)

    async def upkeep(self) -> None:
        """Do what is due now and then."""
        self._scratch.trim()
        self._pages.trim()

    async def stop(self) -> None:
        """End what runs on the loop."""
        await self._tasks.cancel()

    def close(self) -> None:
        """Release the tier; threads that hang are left behind."""
        self._calls.close()
        self.tier.close()

    # reading

    async def read(
        self,
        key: bytes,
        part: int,
        nbytes: int,
        into: memoryview,
        give_up: Callable[[], None] = nothing,
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

        return await self._judge(key, part, nbytes, lambda: self._calls.read(work, give_up))

    async def verify(self, key: bytes, part: int, nbytes: int) -> None:
        """Read one object as it is stored, to see whether it is still good; nobody waits for it."""
        name = identity(key, part)

        def work() -> tuple[Outcome, ObjectHeader | None]:
            with self._scratch.buffer(nbytes) as stored:
                outcome = self._ask(name, stored)  # alone, so it says nothing of the link
                return outcome, verify_object(stored, name) if outcome is HIT else None

        await self._judge(key, part, nbytes, lambda: self._calls.call("check", work))

    async def _judge(
        self,
        key: bytes,
        part: int,
        nbytes: int,
        read: Callable[[], Awaitable[tuple[Outcome, ObjectHeader | None]]],
    ) -> ObjectHeader | None:
        """Read, count, and see to it that what is no good is not read again."""
        name, seen = identity(key, part), self._seen(key, part)
        try:
            outcome, header = await read()
        except CorruptObject as error:
            logger.error("%s: object %s is rejected: %s", self.name, name.hex(), error)
            self._counters.add("corrupt_objects_total", tier=self.name)
            self._reject(key, part, seen)
            return None
        except Incompatible as error:
            # Of a later release, perhaps, which wants to find it again.
            logger.warning("%s: object %s is left alone: %s", self.name, name.hex(), error)
            self._counters.add("incompatible_objects_total", tier=self.name)
            self._leave(key, part, seen)
            return None
        except UsageError as error:
            logger.warning("%s: object %s is not for this reader: %s", self.name, name.hex(), error)
            return None
        except TierUnavailable as error:
            self.trip(error)
            return None
        self._counters.add("tier_reads_total", tier=self.name, outcome=outcome.value)
        if header is None:
            self._missed(key, part, seen, outcome)
        else:
            self._health.worked()
            self._counters.add("tier_read_bytes_total", nbytes, tier=self.name)
            self._learn(key, part, header)
        return header

    def _fetch(self, name: bytes, into: memoryview) -> Outcome:
        """Read one object as it is stored, and measure how fast that goes."""
        brought = 0
        self.bandwidth.begin()
        try:
            outcome = self._ask(name, into)
            brought = len(into) if outcome is HIT else 0
        finally:
            self.bandwidth.end(brought)
        return outcome

    def _ask(self, name: bytes, into: memoryview) -> Outcome:
        (answer,) = self.tier.read([name], [into])
        if isinstance(answer, Outcome):
            return answer
        return HIT if answer == len(into) else Outcome.FAILED  # replaced by a shorter one

    # writing

    async def _encoded(
        self,
        choice: Choice | None,
        data: memoryview,
        origin: Origin,
        level: int,
        give_up: Callable[[], None],
    ) -> Encoded | None:
        """The object as this tier stores it; None where it stays as it is.

        Raises:
            CorruptObject: ``data`` is not what its writer made a checksum of.
            TierUnavailable: encoding hangs.
        """
        if choice is None:
            return None
        place = self.place()

        def work() -> Encoded | None:
            codec = choice.of(origin.weights, (origin.cost or UNKNOWN_S) / len(data), place)
            if codec is None:
                return None
            return encoded_object(codec, data, self._scratch, level)

        try:
            encoded = await self._calls.encode(work, give_up)
        except (CorruptObject, TierUnavailable):
            raise
        except Exception as error:
            report_bug(self._counters, f"codec {choice.name}", error)
            return None
        if encoded is not None:
            stored = len(encoded.data)
            self._counters.add("encoded_bytes_total", len(data), tier=self.name, of="raw")
            self._counters.add("encoded_bytes_total", stored, tier=self.name, of="stored")
        return encoded

    async def _put(
        self, name: bytes, data: memoryview, epoch: int, give_up: Callable[[], None]
    ) -> Outcome:
        """Write one object, under an epoch of this tier's.

        Raises:
            CorruptObject: its header is damaged.
            TierUnavailable: as `TierCalls.read`.
        """

        def work() -> Outcome:
            with self._pages.buffer(HEADER_BYTES) as page:
                page[:] = stamped(data[:HEADER_BYTES], epoch)
                (outcome,) = self.tier.write([Put(name, page, data[HEADER_BYTES:])])
            return outcome

        return await self._calls.call("write", work, give_up)
