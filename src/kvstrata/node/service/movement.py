"""Bytes between the tiers: promotion into leased slots, and writing behind from committed ones.

Both run as tasks on the node's loop, with the work itself in the tiers' threads. A slot is held
from before its copy starts until after it has ended, whatever deadline passes in between.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstrata.node.common.background import Tasks
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.streaming import Stream
from kvstrata.node.service.write_behind import WriteBehind
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Slot, SlotState
from kvstrata.objects import ObjectHeader
from kvstrata.observe.counters import Counters
from kvstrata.parts import at_level, order_name

SPENDABLE = 0.9
"""Of a load's target: the rest is for decoding what came last, and for a link that slows down."""


class Wanted(NamedTuple):
    """An object to be brought into host memory.

    Args:
        key: of the chunk.
        part: which of its objects.
        nbytes: of the object when it is raw, so of the slot.
        backing: the tier it comes from.
        stored: of the object as it lies there.
    """

    key: bytes
    part: int
    nbytes: int
    backing: Backing
    stored: int


class Movement:
    """Moves objects between host memory and the slower tiers.

    Args:
        host: where promoted objects go and committed ones come from.
        backings: the slower tiers, fastest first.
        counters: the node's.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        host: HostMemory,
        backings: list[Backing],
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        self.arriving: dict[tuple[bytes, int], Slot] = {}
        self._filling: set[Slot] = set()
        self._host = host
        self._counters = counters
        self._clock = clock
        self._streams: dict[str, list[Stream]] = {}
        self._tasks = Tasks(counters)
        self.behind = [WriteBehind(host, backing, counters, self._tasks) for backing in backings]

    def promote(self, wanted: Sequence[Wanted], compute_s: float, portable: bool) -> list[Slot]:
        """Start to bring objects into host memory.

        Args:
            wanted: the objects, head of the prompt first.
            compute_s: what computing the KV of one of them takes; `inf`: unknown.
            portable: whether the reader reads the portable order, which coarser copies are in.
        Returns:
            The slots that the leading ones will fill, as many as there is room for; each is held
            once for the caller.
        """
        slots = []
        for one in wanted:
            slot = self._host.allocate(one.nbytes)
            if slot is None:
                break
            self.arriving[one.key, one.part] = slot
            self._filling.add(slot)
            self._host.hold(slot)
            slots.append(slot)
        streams = self._open_streams(wanted[: len(slots)], compute_s, portable)
        for one, slot in zip(wanted, slots, strict=False):
            self._tasks.spawn(
                "a promotion",
                self._promote(one, slot, *streams.get((one.key, one.part), (None, 0))),
            )
        return slots

    def _open_streams(
        self, wanted: Sequence[Wanted], compute_s: float, portable: bool
    ) -> dict[tuple[bytes, int], tuple[Stream, int]]:
        """Of what comes from a tier with a target: the stream it is in, and its number there."""
        opened: dict[tuple[bytes, int], tuple[Stream, int]] = {}
        for backing in {one.backing for one in wanted if one.backing.load_target_s}:
            mine = [one for one in wanted if one.backing is backing]
            streams = self._streams.setdefault(backing.name, [])
            stream = Stream(
                [backing.sizes(one.key, one.part)[: None if portable else 1] for one in mine],
                self._clock() + SPENDABLE * backing.load_target_s,
                compute_s,
                functools.partial(_share, backing, streams),
                backing.num_threads,
                self._clock,
            )
            streams[:] = [one for one in streams if not one.ended] + [stream]
            stream.start()
            opened.update(
                ((one.key, one.part), (stream, number)) for number, one in enumerate(mine)
            )
        return opened

    def write_behind(self, origin: Origin, objects: Sequence[tuple[bytes, Slot]]) -> None:
        """Queue the published objects of a commit, head first, for every slower tier."""
        for behind in self.behind:
            behind.add(origin, objects)

    def forget(self, keys: set[bytes] | None) -> None:
        """Publish and write nothing that is on its way of these chunks (None: of all)."""
        for name in [name for name in self.arriving if keys is None or name[0] in keys]:
            del self.arriving[name]
        for behind in self.behind:
            behind.forget(keys)

    def filling(self) -> list[Slot]:
        """The slots that promotions are filling."""
        return list(self._filling)

    @property
    def queued_bytes(self) -> int:
        """What waits to be written behind, or is being written."""
        return sum(behind.queued_bytes for behind in self.behind)

    async def flush(self) -> None:
        """Wait until what is queued now has been written, or given up."""
        await asyncio.gather(*[behind.flush() for behind in self.behind])

    async def close(self, grace_s: float) -> None:
        """Stop moving: what had not begun is dropped, what runs may end within ``grace_s``."""
        self.forget(None)
        await self._tasks.wait(grace_s)
        await self._tasks.cancel()

    async def _promote(
        self, wanted: Wanted, slot: Slot, stream: Stream | None, number: int
    ) -> None:
        key, part, backing, stored = wanted.key, wanted.part, wanted.backing, wanted.stored
        view = self._host.pool.view(slot.offset, slot.nbytes)

        def settle(header: ObjectHeader | None = None) -> None:
            self._settle(key, part, slot, header)

        def give_up() -> None:
            settle()
            if stream is not None:
                stream.done(number)

        level: int | None = 0
        try:
            if stream is not None:
                level = await stream.turn(number)
                label = "given up" if level is None else str(level)
                self._counters.add("streamed_objects_total", tier=backing.name, level=label)
            if level is None:
                return
            coarser = backing.find(key, at_level(part, level), None) if level else None
            # Gone meanwhile? The object itself need not be.
            level, stored = (level, coarser) if coarser else (0, stored)
            # Past its deadline a thread may still write into the slot, so it stays withheld.
            header = await backing.read(key, at_level(part, level), stored, view, give_up)
            settle(header)
            if slot.state is SlotState.READY and header is not None and level:
                # It serves the loads that wait for it; the next one may be in time for a finer one.
                self._host.drop_object(key, part)
            elif slot.state is SlotState.READY and header is not None:
                self._copy_up(key, part, slot, backing, order_name(header.kind, header.order))
        finally:
            give_up()
            self._host.unhold(slot)

    def _copy_up(self, key: bytes, part: int, slot: Slot, source: Backing, order: str) -> None:
        """Let the tiers between host memory and the one it came from have it too.

        Not those with a lossy codec: what comes back may have been through one already.
        """
        for behind in self.behind:
            backing = behind.backing
            if backing is source:
                break
            lossless = backing.choice is None or backing.choice.lossless
            if lossless and backing.find(key, part, None) is None:
                behind.add(Origin([key], part, order), [(key, slot)])

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
        for tell in waiters:
            tell()


def _share(backing: Backing, streams: list[Stream]) -> float | None:
    """What a tier brings to one of the streams that are under way."""
    if not backing.readable:
        return 0.0
    rate = backing.bandwidth.bytes_per_s
    return rate and rate / max(1, sum(not stream.ended for stream in streams))
