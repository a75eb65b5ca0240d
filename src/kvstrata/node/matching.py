"""What a match is: the leading chunks of a prompt that exist, leased, and on their way if need be.

The local head, whose rows host memory knows already, costs next to nothing a chunk. Behind it each
chunk is looked for part by part, and what lies in slower tiers is promoted. Where no tier of this
node goes on, the shared ones are asked for all the rest, at the same time. A long prompt is
matched in slices, between which others are served: every slice leases what it found before it
ends, so nothing that was found can go, and no cap is passed, while others are served.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from types import MappingProxyType

from kvstrata.node.answering import Answers
from kvstrata.node.common.planner import MEETING_GAIN, Link, meeting, plan
from kvstrata.node.common.slices import Work, in_slices
from kvstrata.node.foreseeing import Foresight
from kvstrata.node.locating import Located, with_slots
from kvstrata.node.searching import Search, checked_namespace, checked_parts
from kvstrata.node.service.backing import Backing, Question
from kvstrata.node.service.expecting import Expecting
from kvstrata.node.service.movement import Movement
from kvstrata.node.service.promotions import Load, Wanted
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import Lease, LeaseTable, is_wanted
from kvstrata.node.slots.reservations import ReservationTable
from kvstrata.node.slots.sampling import Sampler
from kvstrata.node.slots.slot import Row, Slot
from kvstrata.observe.counters import Counters
from kvstrata.parts import PORTABLE
from kvstrata.wire import protocol as p

SLICE = 1024
"""Rows that host memory knows which one slice takes, and chunks whose use it notes."""
SLICE_OBJECTS = 16
"""Objects behind them that one slice looks for and promotes: that costs more."""
SLICE_STARTS = 64
"""Objects that one slice begins to bring."""
SLICE_RELEASED = 64
"""Rows that one slice of a release lets go of."""
SLICE_LOOKUPS = 32
"""Objects that one slice of a lookup looks for."""


class Matcher:
    """Answers matches and lookups.

    Args:
        host: host memory.
        leases: of its rows.
        movement: promotes.
        reservations: know what computing a chunk takes.
        sampler: verifies some of what is found.
        expecting: follows what peers are about to have.
        backings: the slower tiers, fastest first.
        counters: the node's.
        answers: words what is answered in the end.
        planning: whether what is computed sooner than loaded is left to the engine.
    """

    def __init__(
        self,
        host: HostMemory,
        leases: LeaseTable,
        movement: Movement,
        reservations: ReservationTable,
        sampler: Sampler,
        expecting: Expecting,
        backings: Sequence[Backing],
        counters: Counters,
        answers: Answers,
        *,
        planning: bool = True,
    ) -> None:
        self._host = host
        self._leases = leases
        self._movement = movement
        self._reservations = reservations
        self._sampler = sampler
        self._backings = backings
        self._counters = counters
        self._answers = answers
        self._ending: dict[int, tuple[Lease, int]] = {}  # releases under way, and what is kept
        self.planning = planning
        self.used: Callable[[bytes], None] = lambda key: None  # the last that a match found
        self._foresight = Foresight(host, movement, expecting, backings, self.locate)

    def match(self, client: Client, message: p.Match) -> p.Matched | Awaitable[p.Matched]:
        """Lease the leading chunks that exist, and start to promote those in slower tiers."""
        search = Search(client, message)
        if message.peer:
            self._foresight.name(search, message.peer)
        return in_slices(self._work(search))

    def _work(self, search: Search) -> Work[p.Matched]:
        """How a match is answered."""
        return self._match(search)

    def _match(self, search: Search) -> Work[p.Matched]:
        try:
            while not search.take_in():
                yield None
            while not self._step(search):
                yield None
            yield from self._decide(search)
            if search.absent and search.namespace:
                yield from self._ask(search)
            if search.absent and search.peer is not None and search.expected_s:
                yield from self._expect(search)
            # Tails before heads: what is used last is evicted last.
            for stop in range(len(search.tiers), 0, -SLICE):
                self._note_use(search.keys[max(0, stop - SLICE) : stop])
                if stop > SLICE or search.load is not None:
                    yield None
            if search.tiers:
                self.used(search.keys[len(search.tiers) - 1])
            return (yield from self._answers.of(search))
        except BaseException:
            self.release(search.lease)
            raise

    def _ask(self, search: Search) -> Work[None]:
        """Ask the shared tiers for what no tier of this node has, and go on with what they have."""
        keys = search.keys[len(search.tiers) :]
        question = Question(search.namespace, keys, search.parts, search.preferred, search.peer)
        usable = [one for one in self._backings if search.may_use(one.name)]
        asked = [one for one in usable if one.must_be_asked]
        answers = [asyncio.ensure_future(backing.resolve(question)) for backing in asked]
        # All were asked at once; the fastest is heard first, and it may have everything.
        for number, (backing, answer) in enumerate(zip(asked, answers, strict=True), 1):
            yield answer
            if not answer.result():
                search.late.append(backing.name)
            # A slower one may have answered before its turn.
            search.heard = frozenset(one.name for one in usable if one not in asked[number:])
            search.ended = search.absent = False
            while not self._step(search):
                yield None
            yield from self._decide(search)
            if not search.absent:
                return

    def _expect(self, search: Search) -> Work[None]:
        """Take what a named peer does not have yet for something that it is about to have."""
        search.ended = search.absent = False
        search.foreseeing = True
        while not self._step(search):
            yield None
        search.num_found = search.num_decided = len(search.tiers)
        prepared, search.prepared = search.prepared, []
        slots = [slot for _, some in prepared for slot in some]
        yield from self._bring(search, self._foresight.follow(search, slots), len(search.parts))

    def _bring(self, search: Search, slots: Iterable[Slot], num_parts: int) -> Work[None]:
        """Begin to bring what these slots were made for, of chunks with so many parts."""
        if search.load is None:
            return
        left = iter(slots)
        while some := list(itertools.islice(left, SLICE_STARTS)):
            self._movement.start(search.load, some, num_parts)
            yield None

    def lookup(self, message: p.Lookup) -> p.Found | Awaitable[p.Found]:
        """Say where each chunk is; changes nothing."""
        parts, num_keys = tuple(checked_parts(message.parts)), p.count(message.keys, 32)
        namespace, orders = checked_namespace(message.namespace), tuple(message.orders)
        most = max(1, SLICE_LOOKUPS // len(parts))

        def look(keys: bytes) -> Work[bytearray]:
            tiers, wanted = bytearray(), frozenset(orders) or None
            for start in range(0, len(keys) // 32, most):
                if start:
                    yield None
                for key in p.split(keys[32 * start : 32 * (start + most)], 32):
                    located = self.locate(key, parts, wanted)
                    tiers.append(p.ABSENT if located is None else located.tier)
            return tiers

        def work() -> Work[p.Found]:
            tiers = yield from look(message.keys)
            place = tiers.find(p.ABSENT)
            if place >= 0 and namespace and orders:
                rest = message.keys[32 * place :]
                question = Question(namespace, p.split(rest, 32), parts, orders)
                yield asyncio.gather(*[one.resolve(question) for one in self._backings])
                tiers[place:] = yield from look(rest)
            assert len(tiers) == num_keys
            return p.Found(message.id, bytes(tiers))

        return in_slices(work())

    def release(self, lease: Lease | None, keep: int = 0) -> None:
        """End a lease but for its first ``keep`` chunks, and what is promoted for nobody else."""
        if lease is not None:
            self._movement.unwanted(self._leases.release(lease, keep))

    def release_slowly(self, lease: Lease, keep: int = 0) -> Work[None]:
        """The same of a lease that may be long; see `end_releases`."""
        self._ending[lease.id] = lease, keep
        # The last chunks first; what a boundary needs is of no use in part.
        while not lease.shape and len(lease.rows) - max(0, keep) > SLICE_RELEASED:
            self.release(lease, len(lease.rows) - SLICE_RELEASED)
            yield None
        self.release(lease, keep)
        self._ending.pop(lease.id, None)

    def end_releases(self, client: Client) -> None:
        """Have released what this client's process releases: what it asks next comes after that."""
        for lease, keep in list(self._ending.values()):
            if lease.client.holder is client.holder:
                self.release(lease, keep)

    def locate(
        self,
        key: bytes,
        parts: tuple[int, ...],
        orders: frozenset[str] | None = None,
        sizes: Mapping[int, int] = MappingProxyType({}),
        among: Collection[str] = (),
    ) -> Located | None:
        """Where each part of a chunk is, in an order that can be read; None unless all are.

        Args:
            key: of the chunk.
            parts: of the chunk.
            orders: that the reader reads; None: any will do.
            sizes: of the parts' objects when they are raw, as far as it is known.
            among: the tiers it may come from besides host memory; none: all.
        """
        places: list[Slot | Wanted] = []
        slowest = 0
        for part in parts:
            slot = self._host.get(key, part)
            if slot is not None:
                if orders is not None and slot.order not in orders:
                    return None
                places.append(slot)
                continue
            for number, backing in enumerate(self._backings, 1):
                usable = not among or backing.name in among
                if usable and (stored := backing.find(key, part, orders)) is not None:
                    slot = self._movement.arriving.get((key, part))
                    nbytes = sizes.get(part, stored)
                    places.append(slot or Wanted(key, part, nbytes, backing, stored))
                    slowest = max(slowest, number)
                    break
            else:
                return None
        return Located(key, places, slowest, self._host.rows_of(parts).get(key))

    def _step(self, search: Search) -> bool:
        """One slice of a search that has taken all keys in; whether it was the last."""
        if search.client.ended:
            return True
        if self._take_head(search):
            self._take_more(search)
        search.ended = search.ended or len(search.tiers) == search.stop
        return search.ended

    def _take_head(self, search: Search) -> bool:
        """Lease the next chunks that lie in host memory, whole; whether another is next."""
        parts, orders, place = search.parts, search.orders, len(search.tiers)
        known, room = self._host.rows_of(parts).pieces, self._leases.room_for(search.client)
        rows: list[Row] = []
        left, others = SLICE, False
        for key in search.keys[place : min(place + SLICE, search.stop)]:
            row = known[key[0]].get(key)
            if row is None:
                row = self._host.ready_row(key, parts)
                left -= 2 * len(parts)  # its slots were looked for, and gathered
            if (
                row is None
                or row.num_filling
                or (row.order not in orders and not row.in_orders(orders))
            ):
                others = True
                break
            if row.payer is None:
                room -= row.nbytes
                if room < 0:
                    self._cut(search, "leases")
                    break
            rows.append(row)
            left -= 1
            if left <= 0:
                break
        self._lease(search, rows, bytes(len(rows)), [0] * len(rows), here=True)
        return others

    def _take_more(self, search: Search) -> None:
        """Look for the next chunks in all tiers, promote what they lack, and lease them."""
        found = self._look(search)
        lacking = [one.wanted for one in found if one.wanted]
        given: Iterator[list[Slot]] = iter(())
        if lacking:
            if search.load is None:
                search.load = self._load_of(search, lacking[0][0].nbytes)
            with self._host.sparing(search.distinct):
                given = iter(self._movement.promote(search.load, lacking))
        rows: list[Row] = []
        for one in found:
            new = next(given, None) if one.wanted else []
            if new is None:
                self._cut(search, "room")
                break
            if new:
                search.prepared.append((len(search.tiers) + len(rows), new))
            rows.append(self._host.row(one.key, search.parts, with_slots(one.places, new)))
        coming = [sum(wanted.size for wanted in one.wanted) for one in found[: len(rows)]]
        self._lease(search, rows, bytes([one.tier for one in found[: len(rows)]]), coming)

    def _load_of(self, search: Search, nbytes: int) -> Load:
        """What a search promotes, of chunks whose objects need slots of this size."""
        chunk_s, portable = self._reservations.compute_s(nbytes), PORTABLE in search.orders
        return Load(chunk_s, portable, search.owner, search.trace, search.among)

    def _look(self, search: Search) -> list[Located]:
        """The next chunks that are somewhere, as many as a slice and the caps on leases allow."""
        room, place = self._leases.room_for(search.client), len(search.tiers)
        most = max(1, SLICE_OBJECTS // len(search.parts))
        found: list[Located] = []
        for key in search.keys[place : min(place + most, search.stop)]:
            one = self.locate(key, search.parts, search.orders, search.sizes_of(key), search.heard)
            if one is None and search.foreseeing:
                one = self._foresight.locate(search, key)
            if one is None:
                search.ended = search.absent = True
                break
            room -= one.new_bytes
            if room < 0:
                self._cut(search, "leases")
                break
            found.append(one)
        return found

    def _decide(self, search: Search) -> Work[None]:
        """Begin to bring what is worth it of the chunks that were found, and let go of the rest."""
        first, count, others = search.num_decided, len(search.tiers), list[Slot]()
        search.num_found = count
        if self.planning and not search.expected_s and search.prepared and not search.client.ended:
            links = [self._movement.link(backing) for backing in self._backings]
            best = plan(search.tiers[first:], search.coming[first:], links, search.prefill, first)
            keep, load_s = first + best.keep, best.load_s
            decision = "load" if keep == count else "part" if best.load_s else "compute"
            if met := self._meeting(search, links, best.load_s + best.rest_s):
                keep, load_s, decision = count, met, "meet"
            search.load_s = max(search.load_s, load_s)
            self._counters.add("plans_total", decision=decision)
            if keep < count:
                others = self._let_go(search, keep)
        search.num_decided = len(search.tiers)
        if search.meet:
            search.prepared.reverse()
        prepared, search.prepared = search.prepared, []
        # Thousands: not gathered at once.
        slots = itertools.chain((slot for _, some in prepared for slot in some), others)
        yield from self._bring(search, slots, len(search.parts))

    def _meeting(self, search: Search, links: Sequence[Link], otherwise_s: float) -> float:
        """Have the engine compute from the front while the end is brought, where that is sooner.

        What is found in several goes is not brought from its end.

        Args:
            search: with what was found and not decided on yet.
            links: to the slower tiers.
            otherwise_s: what the best plan without that takes.
        Returns:
            What it takes; 0: it is not worth it.
        """
        first, again = search.num_decided, search.meet
        search.meet = 0
        if not search.may_meet or again:
            return 0.0
        tiers, coming = search.tiers[first:], search.coming[first:]
        met = meeting(tiers, coming, links, search.prefill, first)
        if met is None or met.seconds > MEETING_GAIN * otherwise_s:
            return 0.0
        search.meet = first + met.at
        return met.seconds

    def _let_go(self, search: Search, keep: int) -> list[Slot]:
        """Leave all but the first chunks to the engine; the slots of these that others wait for."""
        self._counters.add("computed_chunks_total", len(search.tiers) - keep)
        search.ended, search.absent = True, False
        left = [slot for number, slots in search.prepared if number >= keep for slot in slots]
        for slot in left[:1]:
            self._movement.look_again(slot)
        search.prepared = [one for one in search.prepared if one[0] < keep]
        del search.tiers[keep:]
        self.release(search.lease, keep)
        if not keep:
            search.lease = None
        return [slot for slot in left if is_wanted(slot)]

    def _lease(
        self,
        search: Search,
        rows: Sequence[Row],
        tiers: bytes,
        coming: Sequence[int],
        *,
        here: bool = False,
    ) -> None:
        if not rows:
            return
        if search.lease is None:
            search.lease = self._grant(search)
        self._leases.extend(search.lease, rows, here=here)
        self._sampler.note_hits(search.keys[len(search.tiers) :], search.parts, rows)
        search.tiers += tiers
        search.coming += coming

    def _grant(self, search: Search) -> Lease:
        return self._leases.grant(search.client, search.orders)

    def _cut(self, search: Search, why: str) -> None:
        self._counters.add("matches_cut_total", why=why)
        search.cut, search.ended = why, True

    def _note_use(self, keys: list[bytes]) -> None:
        self._host.index.touch(keys)
        for backing in self._backings:
            backing.use(keys)
