"""A slower tier in the node's service: what all the rest of the node sees of one.

The tier itself only stores bytes. In service every call has a deadline, every read is verified,
objects are encoded and decoded on their way, every failure becomes a counted miss, and a tier that
fails is left alone for a while. What the tier holds, and how one knows, is a subclass's.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstrata.header import ObjectHeader
from kvstrata.node.coding.choosing import Choice
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.common.background import Tasks
from kvstrata.node.service.bandwidth import Bandwidth
from kvstrata.node.service.calls import TierCalls, nothing
from kvstrata.node.service.health import Health
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.turns import Turns
from kvstrata.observe.counters import Counters
from kvstrata.parts import at_level
from kvstrata.quality.choice import Place
from kvstrata.tiers.base import Store
from kvstrata.tiers.marks import Mark, Marks
from kvstrata.transfer.tcp import Address

if TYPE_CHECKING:
    from kvstrata.node.coding.sealing import KeyRing


class Question(NamedTuple):
    """What a match asks of tiers that have to be asked.

    Args:
        namespace: what the chunks belong to, 32 bytes.
        keys: of the chunks, in their order in the prompt.
        parts: that make up a chunk.
        orders: that the reader reads, the one that it likes best first.
        peer: a node that the request names, which may be asked.
        needs: of each part, how many of the last chunks a boundary needs, wherever that is; empty:
            all chunks before it.
    """

    namespace: bytes
    keys: Sequence[bytes]
    parts: tuple[int, ...]
    orders: tuple[str, ...]
    peer: Address | None = None
    needs: tuple[int, ...] = ()


class Backing(ABC):
    """One slower tier in the node's service; lives on the node's loop.

    Args:
        store: where the objects are.
        num_threads: threads for reads, and as many for writes; for encoding see `TierCalls`.
        choice: how new objects are stored, where that makes them smaller; None: as they are.
        coarser: how coarser copies of them are stored besides, finest first.
        keys: what objects are encrypted with, and opened; None: they are not encrypted.
        load_target_s: within it a request's load should end; coarser copies are read for it, or
            the load ends early. 0: loads take what they take.
        queue_bytes: what may wait to be written; beyond it stores skip this tier.
        deadline_s: a tier that completes no call of a kind for this long is taken as hung.
        counters: the node's.
        clock: monotonic seconds.
    """

    capacity_bytes: int
    marks: Marks
    takes_writes = True
    """Whether anything is ever written to it."""
    must_be_asked = False
    """Whether what it holds is known only by asking, so that `find` knows what `resolve` learnt."""

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
        keys: KeyRing | None = None,
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
        self._clock = clock
        self._keys = keys
        # An object that is encrypted has two at a time.
        self._scratch = Scratch((2 if keys is None else 4) * self.num_threads)
        self._pages = Scratch(self.num_threads)
        self._health = Health(self.name, counters, clock, self._when_off)
        self._calls = TierCalls(
            self.name, self.num_threads, min(deadline_s, limits.timeout_s),
            counters=counters, clock=clock, trip=self.trip,
        )  # fmt: skip
        self._turns = Turns()
        self._tasks = Tasks(counters)
        self._timed = False  # whether its speed is known as far as the choice of a codec needs it

    # what it holds

    @abstractmethod
    def find(self, key: bytes, part: int, orders: Iterable[str] | None) -> int | None:
        """Size of an object that can be asked for now, as far as it is known; None: it is absent.

        One known to be in none of these byte orders (None: any will do) counts as absent too.
        """

    def has(self, key: bytes, part: int, orders: Iterable[str]) -> bool:
        """Whether an object is there for sure, so that nobody need store it."""
        return self.find(key, part, orders) is not None

    async def resolve(self, question: Question) -> bool:
        """Ask for chunks, so that `find` knows of them; False if no answer came in time."""
        return True

    async def spared(self, keys: Sequence[bytes], origin: Origin) -> set[bytes]:
        """Which chunks of a commit need not be written, since others have done so."""
        return set()

    @abstractmethod
    def cost_of(self, key: bytes) -> float:
        """What computing a chunk takes, as far as the tier minds it, in seconds; 0: unknown."""

    def priority_of(self, key: bytes) -> int:
        """What a chunk matters more or less than others, as far as the tier minds it."""
        return 0

    @abstractmethod
    def use(self, keys: list[bytes]) -> None:
        """Note the use of a prefix, given head first."""

    def note_needs(self, keys: list[bytes], needed: Set[int], passed: Set[int]) -> None:  # noqa: B027
        """Note which parts of these chunks a match has needed, and which it has passed over."""

    @abstractmethod
    def written(self, prefix: list[bytes]) -> None:
        """Hear that all objects of a commit have been written, or given up.

        Args:
            prefix: the keys of its prompt, head first; of a long one a piece, the tail's before.
        """

    @abstractmethod
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
            nbytes: its size in this tier, as `find` said, or more.
            into: the slot, as long as the object is when it is raw.
            give_up: says that the slot will not be filled in time.
        """

    @abstractmethod
    async def time(self, key: bytes, part: int, nbytes: int) -> None:
        """Read one object for nobody, to see how fast the tier is now.

        Args:
            key: of the chunk.
            part: which of the chunk's objects.
            nbytes: its size, or more.
        """

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
    def mark(self, mark: Mark, *, aged: bool) -> Awaitable[int]:
        """Forget all that a mark covers, also what nobody knows of yet; from now on.

        The answer, once the mark outlives the process and all nodes keep to it: how many objects
        were known and have gone.

        Args:
            mark: what is to be forgotten.
            aged: whether something that is there may be younger than what the mark covers.
        Awaiting it raises:
            TierUnavailable: nothing of it is served here any more, but that is all.
        """

    @abstractmethod
    async def run(self) -> None:
        """What goes on for as long as the tier is in service, or until it has been done."""

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
        if self._health.read_only:
            return f"read only: {self._health.read_only}"
        return "ok" if self.writable else f"read only: {self._health.trouble}"

    def calls_under_way(self) -> dict[str, int]:
        """Calls that wait for a thread of their lane, or run, by lane."""
        return self._calls.under_way()

    @property
    def scratch_bytes(self) -> int:
        """Memory of the buffers in use, and of those kept for the next use."""
        return self._scratch.nbytes + self._pages.nbytes

    def place(self) -> Place | None:
        """What the choice of a codec depends on; None while the tier's speed is not known."""
        if not self._timed:
            return None
        speed, cores = self.bandwidth.bytes_per_s, min(self.num_threads, os.cpu_count() or 1)
        return Place(self.name, self.capacity_bytes, speed, cores) if speed else None

    def sizes(self, key: bytes, part: int) -> list[float]:
        """Size of an object at each level, the object itself first; `inf` where there is none."""
        parts = [at_level(part, level) for level in range(1 + len(self.coarser))]
        return [self.find(key, one, None) or math.inf for one in parts]

    @abstractmethod
    def holdings(self) -> dict[str, Any]:
        """What is known of its contents, for the operator."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError unless the conservation laws hold."""

    def trip(self, error: Exception) -> None:
        """Leave the tier alone for a while: off, or only read where that works."""
        self._health.trip(error)

    def wait_for(self, deadline_s: float) -> None:
        """Take the tier as hung when it completes no call of a kind for this long, from now on."""
        self._calls.wait_for(min(deadline_s, self.tier.limits.timeout_s))

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
