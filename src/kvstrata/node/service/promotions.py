"""What is on its way into host memory: the objects, the load each is part of, the lane it takes."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvstrata.header import NOBODY, ObjectHeader
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.streaming import Stream
from kvstrata.node.slots.slot import Slot
from kvstrata.observe.tracing import Span, Tracer


class Wanted(NamedTuple):
    """An object to be brought into host memory.

    Args:
        key: of the chunk.
        part: which of its objects.
        nbytes: of the object when it is raw, so of the slot.
        backing: the tier it comes from.
        stored: of the object as it lies there; 0: it is not there yet, but about to be.
    """

    key: bytes
    part: int
    nbytes: int
    backing: Backing
    stored: int

    @property
    def size(self) -> int:
        """What bringing it moves, as far as that is known."""
        return self.stored or self.nbytes


class Reading:
    """What one load has from one tier, for as long as something is on its way, as a span."""

    def __init__(self, span: Span) -> None:
        self.num_left = 0
        self._span = span
        self._num_objects = self._num_failed = self._nbytes = 0

    def settled(self, nbytes: int, *, came: bool) -> None:
        """One of its objects has come, or will not."""
        self.num_left -= 1
        self._num_objects += came
        self._num_failed += not came
        self._nbytes += nbytes * came
        if not self.num_left:
            self._span.end(objects=self._num_objects, bytes=self._nbytes, not_come=self._num_failed)


class Promotion:
    """An object on its way into a slot.

    Until it is ``begun`` it can be called off at once. Its slot is being filled until it is
    ``settled``, and held until nothing writes there any more.

    Args:
        wanted: the object.
        slot: where it goes.
        cost: what computing its chunk takes, in seconds; 0: unknown.
        load: what it is a part of.
    """

    __slots__ = ("begun", "bounded", "cost", "level", "number", "priority", "queued", "reading",
                 "settled", "slot", "stream", "tiers", "wanted")  # fmt: skip

    def __init__(self, wanted: Wanted, slot: Slot, cost: float, load: Load) -> None:
        self.wanted = wanted
        self.slot = slot
        self.cost = cost
        self.priority = wanted.backing.priority_of(wanted.key)
        self.tiers, self.bounded = load.tiers, load.bounded
        self.level = 0
        self.stream: Stream | None = None
        self.reading: Reading | None = None
        self.number = 0  # in the stream
        self.queued = self.begun = self.settled = False

    def takes(self, header: ObjectHeader) -> bool:
        """Whether an object is of the kind that its part is, as far as the reader said so."""
        windowed = header.group_kind != "full"
        return self.bounded is None or windowed == (self.wanted.part in self.bounded)


class Load:
    """What one match has promoted; what comes from a tier with a target is one stream.

    Args:
        chunk_s: what computing the KV of one chunk takes; `inf`: unknown.
        portable: whether the reader reads the portable order, which coarser copies are in.
        owner: whose it is taken to be until it is here, 16 bytes.
        trace: traceparent of who waits for it; empty: it is not traced.
        tiers: names of those that may be used for it; none: all.

    ``bounded`` are the parts of which only the last chunks are needed; None: nobody has said.
    """

    def __init__(
        self,
        chunk_s: float,
        portable: bool,
        owner: bytes = NOBODY,
        trace: str = "",
        tiers: frozenset[str] = frozenset(),
    ) -> None:
        self.chunk_s = chunk_s
        self.portable = portable
        self.owner = owner
        self.trace = trace
        self.tiers = tiers
        self.bounded: frozenset[int] | None = None
        self.streams: dict[str, Stream] = {}
        self._readings: dict[str, Reading] = {}

    def read(self, promotion: Promotion, tracer: Tracer | None) -> None:
        """One of its objects is about to be read."""
        if self.trace and tracer is not None:
            tier = promotion.wanted.backing.name
            reading = self._readings.get(tier)
            if reading is None or not reading.num_left:
                span = tracer.start(f"kvstrata.{tier}.read", self.trace)
                reading = self._readings[tier] = Reading(span)
            reading.num_left += 1
            promotion.reading = reading


class Lane:
    """The promotions out of one tier: as many are under way as the tier has threads to read.

    One whose deadline has passed is not among the ``busy`` any more. While it is ``pumping``,
    somebody is about to begin what waits; when that is ``due``, somebody soon will.
    """

    def __init__(self, backing: Backing) -> None:
        self.backing = backing
        self.queued_bytes = 0  # of promotions that were started and have not ended
        self.waiting: deque[Promotion] = deque()
        self.busy: set[Promotion] = set()
        self.streams: list[Stream] = []
        self.pumping = self.due = False

    def share(self) -> float | None:
        """What the tier brings to one of the streams that are under way."""
        if not self.backing.readable:
            return 0.0
        rate = self.backing.bandwidth.bytes_per_s
        return rate and rate / max(1, sum(not stream.ended for stream in self.streams))
