"""What a node tells its fleet of its own tiers: batches of changes, in order, by a thread.

The node's journal is the only queue. Where the registry is off or slow for longer than that
remembers, a batch says that events are missing, and what the node holds is told anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from kvstrata.errors import TierUnavailable
from kvstrata.fleet import events
from kvstrata.fleet.holdings import id_of
from kvstrata.fleet.registry import Registry
from kvstrata.node.common.index import Index
from kvstrata.node.common.journal import Change, Journal
from kvstrata.observe.counters import Counters

EVERY_S = 0.05
"""Between two batches."""
MOST_AT_ONCE = 2048
"""Changes of a batch."""
PAUSE_S = 0.5
"""After a batch that did not get through."""


class Batched(NamedTuple):
    """A batch that is to be sent, and where the journal goes on behind it."""

    number: int
    batch: events.Batch
    moves: Mapping[str, events.Moves]
    next: int


class Telling:
    """Sends a node's events to the registry.

    Args:
        registry: of the fleet.
        name: of the node.
        journal: of its changes, from the first on.
        indexes: of its own tiers, by name.
        counters: the node's.
        in_thread: does what blocks.
    """

    def __init__(
        self,
        registry: Registry,
        name: str,
        journal: Journal,
        indexes: Mapping[str, Index[Any]],
        counters: Counters,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self.boot = 0
        """Of the node's process; nothing is told before it is known."""
        self.told = 0
        """Number of the change that is told next."""
        self.batches = 0
        """That were sent so far."""
        self.lost = 0
        """How often events were missing."""
        self._registry = registry
        self._name = name
        self._journal = journal
        self._indexes = indexes
        self._counters = counters
        self._in_thread = in_thread
        self._pending: Batched | None = None
        self._anew = False
        self._next_boot = 0

    @property
    def behind(self) -> int:
        """Changes that are not told yet."""
        return self._journal.next - self.told

    def begin_anew(self) -> None:
        """What the node holds is to be told anew: the registry has forgotten it."""
        self._anew = True

    def begin_as(self, boot: int) -> None:
        """The node is of another boot from the next batch on, and tells everything anew."""
        self._next_boot = boot

    async def run(self) -> None:
        """Tell of all changes as they are made."""
        while True:
            try:
                busy = await self.step() if self.boot else False
            except TierUnavailable:
                await asyncio.sleep(PAUSE_S)
                continue
            if not busy:
                await asyncio.sleep(EVERY_S)

    async def step(self) -> bool:
        """Send one batch, if there is anything to tell; whether there may be more at once.

        Raises:
            TierUnavailable: it has not got through, and is sent again by the next call.
        """
        if self._next_boot:
            self.boot, self._next_boot = self._next_boot, 0
            self.batches, self._pending, self._anew = 0, None, True
        if self._pending is None:
            if self._anew:
                await self._tell_all()
            read = self._journal.read(self.told, MOST_AT_ONCE)
            if read.lost:
                self.lost += 1
                self._counters.add("fleet_event_gaps_total")
                self._anew = True
                return True
            if not read.changes:
                return False
            make = partial(batched, self.batches + 1, read.changes, read.next)
            self._pending = await self._in_thread(make)
        assert self._pending is not None
        await self._send(self._pending)
        return self.behind >= MOST_AT_ONCE

    async def _send(self, one: Batched) -> None:
        await self._in_thread(
            partial(
                events.publish,
                self._registry, self._name, self.boot, one.number, one.batch, one.moves,
            )
        )  # fmt: skip
        self._counters.add("fleet_events_total", max(0, one.next - self.told))
        self.batches, self.told, self._pending = one.number, one.next, None

    async def _tell_all(self) -> None:
        """Say that events are missing, and put what is here now in the place of what was told."""
        # In one step: what changes from now on comes behind it.
        here = {tier: index.parts() for tier, index in self._indexes.items()}
        begins = self._journal.next

        def refill() -> None:
            for tier, chunks in here.items():
                ids = [id_of(key, part) for key, flat in chunks.items() for part in flat[1::2]]  # type: ignore[arg-type]
                events.refill(self._registry, self._name, self.boot, tier, ids)

        await self._in_thread(refill)
        self._anew = False
        reset = events.Batch(time.time(), [events.Event(events.RESET)])
        self._pending = Batched(self.batches + 1, reset, {}, begins)
        await self._send(self._pending)


def batched(number: int, changes: Sequence[Change], next: int) -> Batched:
    """A batch of changes, in order: those of one kind that follow each other are one event."""
    told: list[events.Event] = []
    moves: dict[str, events.Moves] = {}
    start = 0
    while start < len(changes):
        first = changes[start]
        stop = start + 1
        while stop < len(changes) and _alike(first, changes[stop]):
            stop += 1
        some = changes[start:stop]
        parts = [one.part for one in some]
        what = events.STORED if first.cause is None else events.REMOVED
        told.append(
            events.Event(
                what if first.key else events.CLEARED,
                first.tier,
                first.cause.value if first.key and first.cause else "",
                b"".join(one.key for one in some),
                parts if any(parts) else [],
            )
        )
        _move(moves, some)
        start = stop
    return Batched(number, events.Batch(time.time(), told), moves, next)


def _alike(first: Change, other: Change) -> bool:
    return (first.tier, first.cause, bool(first.key)) == (other.tier, other.cause, bool(other.key))


def _move(moves: dict[str, events.Moves], some: Sequence[Change]) -> None:
    """What these changes do to the set of their tier."""
    first = some[0]
    if not first.key:
        moves[first.tier] = events.Moves(True, set(), set())
        return
    move = moves.setdefault(first.tier, events.Moves(False, set(), set()))
    ids = {id_of(one.key, one.part) for one in some}
    come, go = (move.added, move.removed) if first.cause is None else (move.removed, move.added)
    come |= ids
    go -= ids
