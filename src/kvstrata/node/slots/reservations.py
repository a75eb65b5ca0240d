"""Reservations: slots that a client writes into, and how they become objects, or do not.

Nobody else sees a reserved slot. At its commit the header page is written, and from then on the
object exists; until then nothing of it does.
"""

from __future__ import annotations

import math
import os
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import cast

from kvstrata.errors import UsageError
from kvstrata.header import MARK_BYTES, MARK_TOKENS, GroupKind, Kind, ObjectHeader
from kvstrata.node.slots.clients import Client, Holder
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Slot
from kvstrata.objects import HEADER_BYTES, encode, page_like, saved_s, stored_bytes
from kvstrata.observe.tracing import checked
from kvstrata.parts import KEPT, MAX_PART, PORTABLE, order_name
from kvstrata.policies.base import PRIORITIES
from kvstrata.producers import with_producer
from kvstrata.tiers.marks import Mark, Whose
from kvstrata.wire import protocol as p

NO_PARENT = bytes(32)
NOT_WRITTEN = bytes(16)
MAX_WEIGHTS_CHARS = 256
MAX_COSTS = 256
KEYS_SLICE = 4096
GRANT_SLICE = 16
FINISH_SLICE = 8
TOUCH_SLICE = 1024


class Reservation:
    """Slots that a client may write into until it commits; None where it got none.

    The chunks are ``prefix[first:]``; those in ``unwanted`` were cleared meanwhile. Its objects are
    dated ``created_ns`` once it is being finished.

    Raises:
        UsageError: the request describes objects that cannot exist.
    """

    __slots__ = (
        "_page", "chunk_tokens", "client", "cost", "created_ns", "distinct", "first", "id", "lend",
        "marks", "namespace", "order", "owner", "part", "prefix", "priority", "slots", "template",
        "tiers", "trace", "unwanted", "weights", "whose",
    )  # fmt: skip

    def __init__(self, id: int, client: Client, message: p.Reserve, prefix: list[bytes]) -> None:
        self.id = id
        self.client = client
        self.namespace = message.namespace
        self.prefix = prefix
        self.first = message.first
        self.part = message.part
        self.template = message.template
        self.order = order_name(message.template.kind, message.template.order)
        self.cost = message.cost
        self.weights = message.weights
        self.owner = message.owner
        self.whose = Whose(message.owner, message.namespace)
        self.lend = message.lend
        self.trace = checked(message.traceparent)
        self.priority = message.priority
        self.tiers = frozenset(message.tiers)
        self.marks = message.marks
        self.slots: list[Slot | None] = []
        self.unwanted: set[bytes] = set()
        self.created_ns = 0
        self._page = b""  # the one that those of its other chunks are made after
        if not 0 <= self.first < len(self.prefix):
            raise UsageError(f"chunk {self.first} of {len(self.prefix)} cannot be reserved")
        if not 0 <= self.part <= MAX_PART:
            raise UsageError(f"{self.part} is no part: group << 16 | rank")
        if not 0 <= message.cost < math.inf:
            raise UsageError(f"a cost of {message.cost} s is not a finite time")
        if self.priority not in PRIORITIES:
            raise UsageError(f"{self.priority} is no priority: {PRIORITIES[0]} to {PRIORITIES[-1]}")
        if len(self.weights) > MAX_WEIGHTS_CHARS:
            raise UsageError(f"an identity of weights of {len(self.weights)} characters")
        self.distinct = set(self.prefix)
        if len(self.distinct) != len(self.prefix):
            raise UsageError("no two chunks of a prompt have one key")
        if NO_PARENT in self.prefix:
            raise UsageError("a key of zeros stands for no parent, and for no chunk")
        self.chunk_tokens = self.template.chunk_tokens or self.template.num_tokens
        if self.is_tail and len(self.prefix) != self.first + 1:
            raise UsageError("a tail is one object, the last of its prompt")
        if self.template.group != self.part >> 16:
            raise UsageError(f"a template of group {self.template.group} for part {self.part}, "
                             f"which is of group {self.part >> 16}")  # fmt: skip
        if self.template.kind == "native" and self.template.order in (PORTABLE, KEPT):
            raise UsageError(f"no native byte order may be called {self.template.order}")
        if self.template.kind == "kept" and len(self.prefix) != self.first + 1:
            raise UsageError("kept tokens are one object, the last of its prompt")
        num_marks = self.num_marks * (len(self.prefix) - self.first)
        if self.marks and len(self.marks) != num_marks * MARK_BYTES:
            raise UsageError(f"{len(self.marks)} bytes of marks, not {num_marks} marks")
        # Keys are 32 bytes each, so what holds for the last chunk's header holds for all.
        if problem := self.header(len(self.prefix) - 1, bytes(16)).problem():
            raise UsageError(f"object header: {problem}")

    @property
    def is_tail(self) -> bool:
        """Whether it is of the end of a prompt, which is shorter than a chunk."""
        return self.template.num_tokens < self.chunk_tokens

    @property
    def num_marks(self) -> int:
        """Of each of its objects."""
        return self.template.num_tokens // MARK_TOKENS

    def marks_of(self, number: int) -> bytes:
        """Of chunk ``prefix[number]``."""
        size = self.num_marks * MARK_BYTES
        return self.marks[(number - self.first) * size :][:size]

    def header(self, number: int, checksum: bytes) -> ObjectHeader:
        """The header of chunk ``prefix[number]``; each tier puts its own epoch into it."""
        template, start = self.template, number * self.chunk_tokens
        is_state = template.group_kind == "recurrent"
        return ObjectHeader(
            namespace=self.namespace,
            key=self.prefix[number],
            parent=self.prefix[number - 1] if number else NO_PARENT,
            start=start,
            num_tokens=template.num_tokens,
            group=self.part >> 16,
            rank=self.part & 0xFFFF,
            kind=cast("Kind", template.kind),
            order=template.order,
            dtype=template.dtype,
            shape=tuple(template.shape),
            codec="raw",
            codec_parameters=with_producer(template.producer),
            epoch=0,
            created_ns=self.created_ns,
            raw_length=template.raw_length,
            stored_length=template.raw_length,
            raw_checksum=checksum,
            stored_checksum=checksum,
            chunk_tokens=self.chunk_tokens,
            owner=self.owner,
            group_kind=cast("GroupKind", template.group_kind),
            boundary=start + template.num_tokens if is_state else template.boundary,
            positions=template.positions,
            marks=self.marks_of(number),
        )

    def page(self, number: int, checksum: bytes) -> bytes:
        """The header page of chunk ``prefix[number]``, in a commit; its pages differ in little."""
        if not self._page or self.template.group_kind == "recurrent":
            self._page = encode(self.header(number, checksum))
            return self._page
        key, parent = self.prefix[number], self.prefix[number - 1] if number else NO_PARENT
        start, marks = number * self.chunk_tokens, self.marks_of(number)
        return page_like(self._page, key, parent, start, checksum, marks)


class ReservationTable:
    """All reservations of the node.

    Args:
        host: whose slots they fill.
        per_client_bytes: what the reservations of one process may hold.
        date: says when something was created that is stored now, in nanoseconds since 1970.
    """

    def __init__(
        self,
        host: HostMemory,
        per_client_bytes: int,
        date: Callable[[Whose], int] = lambda whose: time.time_ns(),
    ) -> None:
        self._host = host
        self.per_client_bytes = per_client_bytes
        self._date = date
        # What computing a chunk took, as its last writer said, by the size of its objects: models
        # differ in that.
        self._costs: dict[int, float] = {}
        self._reservations: dict[int, Reservation] = {}
        self._writing: dict[tuple[bytes, int], Reservation] = {}
        self.finishing: set[Reservation] = set()
        # No number means anything to another node, where a client may come with an old one.
        self._next = int.from_bytes(os.urandom(6), "little") + 1

    def __len__(self) -> int:
        return len(self._reservations)

    def grant(
        self, client: Client, message: p.Reserve, presence: Callable[[bytes, int, str], int]
    ) -> Generator[None, None, tuple[Reservation, array[int]]]:
        """Give out slots, head first, as far as there is room; in slices.

        Args:
            client: who writes.
            message: what it asked for.
            presence: key, part and byte order to `PRESENT`, or 0.

        Returns:
            The reservation, and for each chunk a slot's offset or why there is none.

        Raises:
            UsageError: the request describes objects that cannot exist.
        """
        prefix: list[bytes] = []
        for start in range(0, p.count(message.prefix, 32), KEYS_SLICE):
            if start:
                yield
            prefix += p.split(message.prefix[32 * start : 32 * (start + KEYS_SLICE)], 32)
        reservation = Reservation(self._next, client, message, prefix)
        self._next += 1
        nbytes = stored_bytes(reservation.template.raw_length)
        self._learn_cost(reservation, nbytes)
        chunks = reservation.prefix[reservation.first :]
        answers = array("q")
        refusal = 0
        for start in range(0, len(chunks), GRANT_SLICE):
            if start:
                yield
            if client.ended:
                refusal = p.REFUSED
            some = chunks[start : start + GRANT_SLICE]
            refusal = self._grant_some(reservation, some, nbytes, answers, refusal, presence)
        return reservation, answers

    def _grant_some(
        self,
        reservation: Reservation,
        chunks: list[bytes],
        nbytes: int,
        answers: array[int],
        refusal: int,
        presence: Callable[[bytes, int, str], int],
    ) -> int:
        """Give out slots for the next chunks; why there are no more, or 0."""
        client, part = reservation.client, reservation.part
        here = [
            p.BUSY if (key, part) in self._writing else presence(key, part, reservation.order)
            for key in chunks
        ]
        left = max(0, self.per_client_bytes - client.reserved_bytes)  # caps may be lowered
        allowed = 0 if refusal else left // nbytes
        with self._host.sparing(reservation.distinct):
            wanted = min(allowed, here.count(0))
            slots = self._host.allocate_many(nbytes, wanted, reservation.owner)
        if len(slots) < here.count(0):
            refusal = refusal or (p.REFUSED if len(slots) == allowed else p.FULL)
        if slots:
            client.holder.reserved_bytes += len(slots) * nbytes
            client.holder.reserved_cap_bytes = self.per_client_bytes
        rest = iter(slots)
        for key, answer in zip(chunks, here, strict=True):
            slot = None if answer else next(rest, None)
            reservation.slots.append(slot)
            if slot is not None:
                self._writing[key, part] = reservation
            answers.append(slot.offset if slot is not None else answer or refusal)
        if slots:
            client.reservations.add(reservation.id)
            self._reservations[reservation.id] = reservation
        return refusal

    def _learn_cost(self, reservation: Reservation, nbytes: int) -> None:
        """Remember what computing a chunk took, or fill in what it took last time."""
        if reservation.cost:
            self._costs.pop(nbytes, None)
            self._costs[nbytes] = reservation.cost
            if len(self._costs) > MAX_COSTS:
                del self._costs[next(iter(self._costs))]
        else:
            reservation.cost = self._costs.get(nbytes, 0.0)
        if reservation.is_tail:
            reservation.cost *= reservation.template.num_tokens / reservation.chunk_tokens

    def compute_s(self, nbytes: int) -> float:
        """What computing a chunk takes whose objects need slots of this size; `inf`: unknown."""
        return self._costs.get(nbytes, math.inf)

    def __getitem__(self, id: int) -> Reservation:
        return self._reservations[id]

    def get(self, id: int) -> Reservation | None:
        """A reservation by its number."""
        return self._reservations.get(id)

    def finish(
        self, reservation: Reservation, checksums: list[bytes]
    ) -> Generator[None, None, list[tuple[bytes, Slot]]]:
        """End a reservation: publish the slots that have a checksum, give back the others.

        In slices, of which the first ends it for everybody else; none if it is short.

        Returns:
            What was published, head first; the caller ends the hold on each slot. Of these chunks
            some may be ``unwanted`` by then: nothing else may have them.
        """
        written: list[tuple[bytes, Slot]] = []
        reservation.created_ns = self._date(reservation.whose)
        reservation.client.reservations.discard(reservation.id)
        del self._reservations[reservation.id]
        self.finishing.add(reservation)
        # Tails enter the policy before heads, so that they leave it first.
        num_done = 0
        for number in reversed(range(len(reservation.slots))):
            slot = reservation.slots[number]
            if slot is None:
                continue
            if num_done and num_done % FINISH_SLICE == 0:
                yield
            num_done += 1
            reservation.slots[number] = None
            key = reservation.prefix[reservation.first + number]
            del self._writing[key, reservation.part]
            reservation.client.holder.reserved_bytes -= slot.nbytes
            if (
                checksums[number] == NOT_WRITTEN
                or key in reservation.unwanted
                or not self._host.quotas.may_publish(key, slot, reservation.whose)
            ):
                self._host.discard(slot)
                self._host.unhold(slot)
            else:
                page = reservation.page(reservation.first + number, checksums[number])
                self._publish(reservation, key, slot, page)
                written.append((key, slot))
        # Tails before heads: what is used last is evicted last.
        for stop in range(reservation.first if written else 0, 0, -TOUCH_SLICE):
            if stop < reservation.first:
                yield
            self._host.index.touch(reservation.prefix[max(0, stop - TOUCH_SLICE) : stop])
        self.finishing.discard(reservation)
        return written[::-1]

    def _publish(self, reservation: Reservation, key: bytes, slot: Slot, page: bytes) -> None:
        view = self._host.pool.view(slot.offset, slot.nbytes)
        view[:HEADER_BYTES] = page
        end = HEADER_BYTES + reservation.template.raw_length
        view[end:] = bytes(slot.nbytes - end)
        order, whose = reservation.order, reservation.whose
        cost = reservation.cost
        if reservation.template.group_kind == "recurrent":
            cost = saved_s(view, cost, alone=key not in self._host.index)
        self._host.publish(key, reservation.part, slot, order, cost, whose, reservation.priority)

    def abort(self, reservation: Reservation) -> Generator[None, None, None]:
        """End a reservation unwritten; in slices, as `finish`."""
        yield from self.finish(reservation, [NOT_WRITTEN] * len(reservation.slots))

    def forget(self, keys: set[bytes] | None) -> None:
        """Publish nothing of what is being written of these chunks (None: of all).

        What has been published of a commit that is not finished goes nowhere from there either.
        """
        for (key, _), reservation in self._writing.items():
            if keys is None or key in keys:
                reservation.unwanted.add(key)
        for reservation in self.finishing:
            chunks = reservation.distinct
            reservation.unwanted |= chunks if keys is None else chunks & keys

    def is_being_written(self, key: bytes, parts: Sequence[int]) -> bool:
        """Whether somebody writes one of a chunk's objects now."""
        return bool(self._writing) and any((key, part) in self._writing for part in parts)

    def forget_marked(self, mark: Mark, *, aged: bool) -> None:
        """The same of all that a mark covers; ``aged``: what is not committed yet is younger."""
        for (key, _), reservation in self._writing.items():
            if not aged and mark.fits(reservation.whose):
                reservation.unwanted.add(key)
        for reservation in self.finishing:
            if mark.covers(reservation.whose, reservation.created_ns):
                reservation.unwanted |= reservation.distinct

    def filling(self) -> Iterable[Slot]:
        """The slots that clients are filling."""
        for reservation in (*self._reservations.values(), *self.finishing):
            yield from (slot for slot in reservation.slots if slot is not None)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every reservation is counted once."""
        writing = set()
        reserved: dict[Holder, int] = {}
        for reservation in (*self._reservations.values(), *self.finishing):
            client = reservation.client
            assert (reservation.id in client.reservations) == (reservation not in self.finishing)
            chunks = reservation.prefix[reservation.first :]
            for key, slot in zip(chunks, reservation.slots, strict=False):
                if slot is not None:
                    writing.add((key, reservation.part))
                    assert self._writing.get((key, reservation.part)) is reservation
                    holder = client.holder
                    reserved[holder] = reserved.get(holder, 0) + slot.nbytes
        assert writing == self._writing.keys()
        for holder, nbytes in reserved.items():
            assert holder.reserved_bytes == nbytes <= holder.reserved_cap_bytes
