"""Bytes between the tiers: promotion into leased slots, and writing behind from committed ones.

All of it runs on the node's loop, with the work itself in the tiers' threads. A slot is held from
before its copy starts until after it has ended, whatever deadline passes in between.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from kvstrata.header import ObjectHeader
from kvstrata.node.common.background import Tasks
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.planner import Link
from kvstrata.node.common.slices import Work, at_once
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.promotions import Lane, Load, Promotion, Wanted
from kvstrata.node.service.streaming import Stream
from kvstrata.node.service.write_behind import WriteBehind
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import LeaseTable, is_wanted
from kvstrata.node.slots.slot import Slot, SlotState
from kvstrata.observe.counters import Counters
from kvstrata.observe.tracing import Tracer
from kvstrata.parts import at_level, order_name
from kvstrata.tiers.marks import UNKNOWN, Whose

CALL_OFF_SLICE = 64
LOOK_AGAIN_S = 10.0
"""A tier that is too slow to load from is not loaded from, so nobody would see it become fast."""
SPENDABLE = 0.9
"""Of a load's target: the rest is for decoding what came last, and for a link that slows down."""


class Movement:
    """Moves objects between host memory and the slower tiers.

    Args:
        host: where promoted objects go and committed ones come from.
        leases: whose rows the promotions are for.
        backings: the slower tiers, fastest first.
        counters: the node's.
        clock: monotonic seconds.
        tracer: of those loads and stores that are traced.
    """

    def __init__(
        self,
        host: HostMemory,
        leases: LeaseTable,
        backings: Sequence[Backing],
        counters: Counters,
        clock: Callable[[], float],
        tracer: Tracer | None = None,
    ) -> None:
        self.arriving: dict[tuple[bytes, int], Slot] = {}
        self._promotions: dict[Slot, Promotion] = {}
        self._unwanted: deque[Slot] = deque()
        self._struck: deque[Slot] = deque()  # forgotten before they had begun
        self._calling_off = False
        self._host = host
        self._leases = leases
        self._counters = counters
        self._clock = clock
        self._tracer = tracer
        self._order = {backing.name: number for number, backing in enumerate(backings)}
        self._lanes = {backing.name: Lane(backing) for backing in backings}
        self._tasks = Tasks(counters)
        self.behind = [
            WriteBehind(host, backing, counters, self._tasks, tracer)
            for backing in backings
            if backing.takes_writes
        ]

    def promote(self, load: Load, chunks: Sequence[Sequence[Wanted]]) -> list[list[Slot]]:
        """Make slots for objects to be brought into host memory; `start` brings them.

        Args:
            load: what it is for.
            chunks: what is wanted of each chunk, head of the prompt first.
        Returns:
            The slots that the leading chunks will fill, as many chunks as there is room for.
        """
        sizes = Counter(one.nbytes for chunk in chunks for one in chunk)
        free = {
            size: self._host.allocate_many(size, count, load.owner) for size, count in sizes.items()
        }
        for slots in free.values():
            slots.reverse()
        given: list[list[Slot]] = []
        for chunk in chunks:
            needs = Counter(one.nbytes for one in chunk)
            if any(len(free[size]) < count for size, count in needs.items()):
                break
            given.append([free[one.nbytes].pop() for one in chunk])
            for one, slot in zip(chunk, given[-1], strict=True):
                slot.rows = []
                self.arriving[one.key, one.part] = slot
                cost = one.backing.cost_of(one.key)
                if not cost and load.chunk_s < math.inf:
                    cost = load.chunk_s
                self._promotions[slot] = Promotion(one, slot, cost, load)
        for slots in free.values():
            for slot in slots:
                self._host.discard(slot)
                self._host.unhold(slot)
        return given

    def start(self, load: Load, slots: Iterable[Slot], num_parts: int) -> None:
        """Bring what `promote` made these slots for, of chunks with so many parts."""
        lanes, streams = set(), set()
        for slot in slots:
            promotion = self._promotions.get(slot)
            if promotion is None or promotion.queued or not self._is_arriving(promotion):
                continue  # forgotten, unwanted, or begun by another match, since `promote`
            one = promotion.wanted
            lane = self._lanes[one.backing.name]
            promotion.queued = True
            load.read(promotion, self._tracer)
            lane.queued_bytes += one.size
            if not one.backing.load_target_s:
                lane.waiting.append(promotion)
                lanes.add(lane)
                continue
            stream = load.streams.get(lane.backing.name)
            if stream is None:
                stream = load.streams[lane.backing.name] = Stream(
                    self._clock() + SPENDABLE * one.backing.load_target_s,
                    load.chunk_s / num_parts,
                    lane.share,
                    one.backing.num_threads,
                    self._clock,
                )
            levels = None if load.portable else 1
            turn = functools.partial(self._have_turn, lane, promotion)
            promotion.stream = stream
            promotion.number = stream.add(one.backing.sizes(one.key, one.part)[:levels], turn)
            streams.add((lane, stream))
        for lane, stream in streams:
            lane.streams[:] = [s for s in lane.streams if not s.ended and s is not stream]
            lane.streams.append(stream)
            stream.begin()
        for lane in lanes:
            self._pump(lane)

    def prepared(self, slot: Slot) -> Wanted | None:
        """What is still wanted in a slot that `start` has not been told of; None: nothing is."""
        promotion = self._promotions.get(slot)
        if promotion is None or promotion.queued or promotion.settled:
            return None
        return promotion.wanted

    def give_up(self, slots: Iterable[Slot]) -> None:
        """What `promote` made these slots for, and `start` was not told of, does not come."""
        self._struck.extend(slot for slot in slots if self.prepared(slot))
        self._call_off()

    def link(self, backing: Backing) -> Link:
        """How fast a tier brings what is asked of it now."""
        speed, lane = backing.bandwidth, self._lanes[backing.name]
        return Link(speed.bytes_per_s, speed.shortest_s, lane.queued_bytes)

    def look_again(self, slot: Slot) -> None:
        """See how fast a tier is, if nothing was read there for a while.

        Args:
            slot: for something that it has.
        """
        if (promotion := self._promotions.get(slot)) is None:
            return
        one = promotion.wanted
        if one.backing.bandwidth.age_s > LOOK_AGAIN_S and not self._lanes[one.backing.name].busy:
            one.backing.bandwidth.looked()
            self._tasks.spawn("a look", one.backing.time(one.key, one.part, one.size))

    def unwanted(self, slots: Iterable[Slot]) -> None:
        """Nobody waits for these promotions any more: those that have not begun are called off."""
        # The last first: what gives up its turn lets one before it have it, which is unwanted too.
        self._unwanted.extend(reversed(list(slots)))
        self._call_off()

    def write_behind(self, origin: Origin, objects: Sequence[tuple[bytes, Slot]]) -> Work[None]:
        """Queue the published objects of a commit, head first, for every slower tier; in slices."""
        for queueing in [behind.add(origin, objects) for behind in self.behind]:
            yield from queueing

    def forget(self, keys: set[bytes] | None) -> None:
        """Publish and write nothing that is on its way of these chunks (None: of all)."""
        if keys is None:
            struck, self.arriving = self.arriving, {}
        else:
            struck = {name: slot for name, slot in self.arriving.items() if name[0] in keys}
            for name in struck:
                del self.arriving[name]
        for key in {key for key, _ in struck}:
            self._host.forget_rows(key)
        self._struck.extend(struck.values())
        self._call_off()
        for behind in self.behind:
            behind.forget(keys)

    def filling(self) -> list[Slot]:
        """The slots that promotions are filling."""
        return [slot for slot, promotion in self._promotions.items() if not promotion.settled]

    def under_way(self) -> Iterable[Slot]:
        """The slots that promotions are filling, or that something may still write into."""
        return self._promotions.keys()

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

    def check_integrity(self) -> None:
        """Raise AssertionError unless every promotion has a place, and is wanted."""
        waiting: set[Promotion] = set()
        for lane in self._lanes.values():
            queued = [
                one.wanted.size
                for one in self._promotions.values()
                if one.queued and not one.settled and one.wanted.backing is lane.backing
            ]
            assert lane.queued_bytes == sum(queued)
            mine = [one for one in lane.waiting if not one.settled]
            waiting.update(mine)
            assert len(lane.busy) <= lane.backing.num_threads
            assert all(one.begun for one in lane.busy)
            assert lane.busy or lane.due or not (mine and lane.backing.readable), "nobody reads"
        for slot, one in self._promotions.items():
            assert slot.holds > 0
            assert one.slot is slot
            assert slot.rows is not None
            assert one.settled == (slot.state is not SlotState.FILLING)
            if not one.begun:
                assert is_wanted(slot) or slot in self._unwanted, "a promotion for nobody"
                assert one in waiting or one.stream is not None or not one.queued
        for name, slot in self.arriving.items():
            one = self._promotions[slot]
            assert (one.wanted.key, one.wanted.part) == name
            assert not one.settled
        for behind in self.behind:
            behind.check_integrity()

    def _have_turn(self, lane: Lane, promotion: Promotion, level: int | None) -> None:
        """The stream lets an object be read at this level; None: not at all."""
        label = "given up" if level is None else str(level)
        self._counters.add("streamed_objects_total", tier=lane.backing.name, level=label)
        if level is None:
            self._call_off_one(promotion, "failed")
            return
        promotion.level = level
        lane.waiting.append(promotion)
        self._pump(lane)

    def _pump(self, lane: Lane) -> None:
        """Begin as many promotions as may be under way; none while the tier is left alone."""
        # To call one off gives the next of its stream a turn, which comes back here. Not within
        # each other: a stream may have thousands that nobody wants any more.
        if not lane.pumping:
            lane.pumping, lane.due = True, False
            try:
                self._begin_some(lane)
            finally:
                lane.pumping = False

    def _begin_some(self, lane: Lane) -> None:
        for _ in range(CALL_OFF_SLICE):
            if not lane.waiting or len(lane.busy) >= lane.backing.num_threads:
                return
            promotion = lane.waiting.popleft()
            if promotion.settled:
                continue
            if not is_wanted(promotion.slot):
                self._call_off_one(promotion, "unwanted")
                continue
            if not (lane.backing.readable and self._is_arriving(promotion)):
                self._call_off_one(promotion, "failed")
                continue
            promotion.begun = True
            lane.busy.add(promotion)
            self._tasks.spawn("a promotion", self._promote(lane, promotion))
        # So many were called off that others shall be served first.
        lane.due = True
        asyncio.get_running_loop().call_soon(self._pump, lane)

    def _call_off_one(self, promotion: Promotion, outcome: str) -> None:
        """End a promotion that has not begun."""
        self._settle(promotion, None, outcome)
        if promotion.stream is not None:
            promotion.stream.done(promotion.number)
        self._end(promotion)

    def _call_off(self) -> None:
        """Call off what is unwanted or struck: some of it now, the rest soon."""
        self._call_off_some()
        if (self._unwanted or self._struck) and not self._calling_off:
            self._calling_off = True
            self._tasks.spawn("an end of promotions", self._call_off_rest())

    def _call_off_some(self) -> None:
        for _ in range(min(len(self._struck), CALL_OFF_SLICE)):
            struck = self._promotions.get(self._struck.pop())
            if struck is not None and not (struck.begun or struck.settled):
                self._call_off_one(struck, "failed")
        for _ in range(min(len(self._unwanted), CALL_OFF_SLICE)):
            slot = self._unwanted.popleft()
            promotion = self._promotions.get(slot)
            if promotion is not None and not promotion.begun and not is_wanted(slot):
                self._call_off_one(promotion, "unwanted")

    async def _call_off_rest(self) -> None:
        while self._unwanted or self._struck:
            await asyncio.sleep(0)
            self._call_off_some()
        self._calling_off = False

    async def _promote(self, lane: Lane, promotion: Promotion) -> None:
        key, part, nbytes, backing, stored = promotion.wanted
        slot, level = promotion.slot, promotion.level
        view = self._host.pool.view(slot.offset, nbytes)

        def give_up() -> None:
            self._settle(promotion, None)
            if promotion in lane.busy:
                lane.busy.discard(promotion)
                if promotion.stream is not None:
                    promotion.stream.done(promotion.number)
                self._pump(lane)

        try:
            coarser = backing.find(key, at_level(part, level), None) if level else None
            # Gone meanwhile? The object itself need not be.
            level, stored = (level, coarser) if coarser else (0, stored)
            # Past its deadline a thread may still write into the slot, so it stays withheld.
            header = await backing.read(key, at_level(part, level), stored, view, give_up)
            self._settle(promotion, header)
            if slot.state is SlotState.READY and header is not None and level:
                # It serves the loads that wait for it; the next one may be in time for a finer one.
                self._host.drop_object(key, part, Cause.SPENT)
            elif slot.state is SlotState.READY and header is not None:
                self._copy_up(promotion, header)
        finally:
            give_up()
            self._end(promotion)

    def _copy_up(self, promotion: Promotion, header: ObjectHeader) -> None:
        """Let the tiers between host memory and the one it came from have it too.

        Not those with a lossy codec: what comes back may have been through one already.
        """
        key, part = promotion.wanted.key, promotion.wanted.part
        order = order_name(header.kind, header.order)
        for behind in self.behind:
            backing = behind.backing
            if self._order[backing.name] >= self._order[promotion.wanted.backing.name]:
                break
            lossless = backing.choice is None or backing.choice.lossless
            if lossless and backing.find(key, part, None) is None:
                origin = Origin([key], part, order, promotion.cost, "", header.namespace, "",
                                promotion.priority, promotion.tiers, header.is_tail)  # fmt: skip
                at_once(behind.add(origin, [(key, promotion.slot)]))

    def _settle(
        self, promotion: Promotion, header: ObjectHeader | None, outcome: str = "failed"
    ) -> None:
        """A promotion has come to its end, or to its deadline; only the first word counts."""
        if promotion.settled:
            return
        promotion.settled = True
        if header is not None and not promotion.takes(header):
            name = promotion.wanted.backing.name
            self._counters.add("incompatible_objects_total", tier=name)
            header = None
        if promotion.queued:
            self._lanes[promotion.wanted.backing.name].queued_bytes -= promotion.wanted.size
        slot, key, part = promotion.slot, promotion.wanted.key, promotion.wanted.part
        wanted = self._is_arriving(promotion)
        if wanted:
            del self.arriving[key, part]
        whose = UNKNOWN if header is None else Whose(header.owner, header.namespace)
        if header is not None and wanted and self._host.quotas.may_publish(key, slot, whose):
            order = order_name(header.kind, header.order)
            cost, priority = promotion.cost, promotion.priority
            self._host.publish(key, part, slot, order, cost, whose, priority)
            outcome = "done"
        else:
            self._host.forget_rows(key)
            self._host.discard(slot)
        self._counters.add("promotions_total", outcome=outcome)
        if promotion.reading is not None:
            promotion.reading.settled(promotion.wanted.size, came=outcome == "done")
        for row in slot.rows or ():
            row.filled(slot)

    def _is_arriving(self, promotion: Promotion) -> bool:
        """Whether it has not been forgotten."""
        name = promotion.wanted.key, promotion.wanted.part
        return self.arriving.get(name) is promotion.slot

    def _end(self, promotion: Promotion) -> None:
        """Nothing writes into its slot any more."""
        del self._promotions[promotion.slot]
        self._leases.promotion_ended(promotion.slot)
        self._host.unhold(promotion.slot)
