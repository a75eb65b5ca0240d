"""Matches of models with several kinds of layer groups: the longest boundary that is whole.

Full attention needs every chunk before a boundary, a window the last ones, a recurrent state the
last one. So it is found out first how far the prompt goes on, then which boundary on that way is
the longest one that is whole; only then is anything leased: what that boundary needs. Where some
of it has gone meanwhile, or there is no room for it, the next lower one is taken.

What a named peer is about to have counts for the end of the prompt alone: where everything that end
needs is to come, that is leased. A boundary is of use only whole, so whoever waits in vain asks
again, for what is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvstrata.node.bounds import Bounds
from kvstrata.node.common.slices import Work, in_slices
from kvstrata.node.matching import SLICE, Matcher
from kvstrata.node.operating.explaining import Looked
from kvstrata.node.pricing import Prices
from kvstrata.node.searching import Search
from kvstrata.node.service.backing import Backing, Question
from kvstrata.node.service.promotions import Load
from kvstrata.node.slots.boundaries import longest
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.leases import Lease, is_wanted
from kvstrata.node.slots.slot import Row
from kvstrata.wire import protocol as p
from kvstrata.wire.namespaces import Described

WALK_SLICE = 64
"""Chunks that one slice of a walk looks for."""
NOTE_SLICE = 1024
"""Objects of which one slice notes whether they were needed."""
CUTS = 8
"""So often a boundary that cannot be had gives way to the next one below; then it goes by leaps."""


class GroupMatcher(Matcher):
    """A `Matcher` that knows boundaries, too.

    Args:
        args, more: as of `Matcher`.
        describe: what a namespace is made of, by its digest; None: nobody has said.
    """

    def __init__(
        self, *args: Any, describe: Callable[[bytes], Described | None], **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self._describe = describe

    def lookup(self, message: p.Lookup) -> p.Found | Awaitable[p.Found]:
        """Say where each chunk is that a match would lease, or where each is; changes nothing."""
        needs = self._needs_told(message.namespace, message.parts)
        if not needs:
            return super().lookup(message)

        def work() -> Work[p.Found]:
            looked = yield from self._look_for(message, needs)
            return p.Found(message.id, looked.tiers)

        return in_slices(work())

    async def look(self, message: p.Lookup) -> Looked:
        """The same, and how far the prompt goes on."""
        needs = self._needs_told(message.namespace, message.parts)
        if needs:
            looking = in_slices(self._look_for(message, needs))
            return looking if isinstance(looking, Looked) else await looking
        answer = self.lookup(message)
        found = answer if isinstance(answer, p.Found) else await answer
        end = found.tiers.find(p.ABSENT)
        return Looked(found.tiers, len(found.tiers) if end < 0 else end, -1)

    def _work(self, search: Search) -> Work[p.Matched]:
        bounds = search.bounds
        return self._match(search) if bounds is None else self._match_groups(search, bounds)

    def _match_groups(self, search: Search, bounds: Bounds) -> Work[p.Matched]:
        try:
            while not search.take_in():
                yield None
            yield from self._find_out(search, bounds)
            if not (yield from self._expect_end(search, bounds)):
                yield from self._settle(search, bounds)
            yield from self._start(search, bounds)
            yield from self._note_uses(search, bounds)
            search.parts = bounds.full
            return (yield from self._answers.of(search))
        except BaseException:
            self.release(search.lease)
            raise

    def _needs_told(self, namespace: bytes, parts: Sequence[int]) -> list[int]:
        told = self._describe(namespace) if namespace else None
        return told.needs_of(parts) if told is not None else []

    def _look_for(self, message: p.Lookup, needs: Sequence[int]) -> Work[Looked]:
        asked = p.Match(message.id, message.keys, message.parts, message.orders,
                        namespace=message.namespace, needs=[*needs])  # fmt: skip
        search = Search(Client("a lookup"), asked)
        bounds = Bounds(search.parts, needs)
        while not search.take_in():
            yield None
        yield from self._find_out(search, bounds)
        tiers = bytearray()
        for one in bounds.stretches():
            parts = bounds.parts_of(one)
            for number in range(one.start, one.stop):
                if number % WALK_SLICE == WALK_SLICE - 1:
                    yield None
                located = self.locate(search.keys[number], parts, search.orders or None)
                tiers.append(p.ABSENT if located is None else located.tier)
        tiers += bytes([p.ABSENT]) * (len(search.keys) - len(tiers))
        return Looked(bytes(tiers), bounds.end, bounds.hole)

    # what is there

    def _find_out(self, search: Search, bounds: Bounds) -> Work[None]:
        """Find the longest boundary, by what the node knows and what shared tiers say."""
        yield from self._walk(search, bounds)
        yield from self._find_boundary(search, bounds, bounds.end)
        asked = [one for one in self._backings if one.must_be_asked and search.may_use(one.name)]
        if not (asked and search.namespace and search.preferred):
            return
        if bounds.full and bounds.end < len(search.keys):
            rest = search.keys[bounds.end :]
            yield from self._hear(search, asked, Question(
                search.namespace, rest, bounds.full, search.preferred, search.peer
            ))  # fmt: skip
            yield from self._walk(search, bounds)
            yield from self._find_boundary(search, bounds, bounds.end)
        if bounds.boundary < bounds.end:
            # What the longest one known needs is there, so no longer one lacks anything before it.
            rest = search.keys[bounds.boundary : bounds.end]
            needs_there = bounds.needs_at(bounds.end)
            some = [(part, need) for part, need in zip(bounds.parts, needs_there, strict=True)
                    if need]  # fmt: skip
            parts, needs = zip(*some, strict=True)
            yield from self._hear(search, asked, Question(
                search.namespace, rest, parts, search.preferred, search.peer, needs
            ))  # fmt: skip
            yield from self._find_boundary(search, bounds, bounds.end)

    def _walk(self, search: Search, bounds: Bounds) -> Work[None]:
        """Find where the prompt ends as far as every chunk is needed."""
        if not bounds.full:
            bounds.end = len(search.keys)
        while bounds.end < len(search.keys):
            if bounds.end % WALK_SLICE == WALK_SLICE - 1:
                yield None
            if not self._has(search, search.keys[bounds.end], bounds.full):
                return
            bounds.end += 1

    def _find_boundary(self, search: Search, bounds: Bounds, most: int) -> Work[None]:
        bounds.boundary, hole = yield from self._longest(search, bounds, most)
        if most == bounds.end:
            bounds.hole = hole

    def _longest(self, search: Search, bounds: Bounds, most: int) -> Work[tuple[int, int]]:
        """As `longest`."""

        def there(column: int, number: int) -> bool:
            return self._has(search, search.keys[number], (bounds.parts[column],))

        needs = bounds.needs_at(most)
        if needs == bounds.needs:
            return (yield from longest(needs, most, there))
        # Of what no whole chunk ends but the prompt: that is one, or a shorter one is as all are.
        boundary, hole = yield from longest(needs, most, there, most - 1)
        if boundary < most:
            boundary, _ = yield from longest(bounds.needs, most - 1, there)
        return boundary, hole

    def _has(self, search: Search, key: bytes, parts: tuple[int, ...]) -> bool:
        """Whether these parts of a chunk are somewhere, in an order that can be read."""
        orders = search.orders or None
        row = self._host.rows_of(parts).get(key)
        if row is not None and orders is not None and not row.num_filling:
            return row.in_orders(orders)
        return self.locate(key, parts, orders, among=search.among) is not None

    def _hear(self, search: Search, asked: Sequence[Backing], question: Question) -> Work[None]:
        """Let shared tiers say what they have, each for as long as its patience lasts."""
        answers = [asyncio.ensure_future(one.resolve(question)) for one in asked]
        for backing, answer in zip(asked, answers, strict=True):
            yield answer
            if not answer.result() and backing.name not in search.late:
                search.late.append(backing.name)

    # leasing

    def _expect_end(self, search: Search, bounds: Bounds) -> Work[bool]:
        """Lease what the prompt's end needs, as the named peer is to have it; whether that went."""
        known = bounds.boundary
        if search.peer is None or not search.expected_s or known == len(search.keys):
            return False
        bounds.boundary, search.foreseeing = len(search.keys), True
        yield from self._begin_again(search, bounds)
        yield from self._take(search, bounds)
        search.foreseeing = False
        if len(search.tiers) == bounds.boundary:
            search.num_found = bounds.end = bounds.boundary
            return True
        bounds.boundary = known
        return False

    def _settle(self, search: Search, bounds: Bounds) -> Work[None]:
        """Lease what the boundary needs, or a lower one that can be had, and is worth it."""
        cuts, most, planned = 0, bounds.end, False
        while not search.client.ended:
            yield from self._begin_again(search, bounds)
            yield from self._take(search, bounds)
            got = len(search.tiers)
            if got == bounds.boundary and not planned:
                planned = True
                most = yield from self._plan(search, bounds)
                if most == got:
                    break
            elif got == bounds.boundary:
                break
            elif search.absent:
                most = got
            else:
                cuts += 1
                most = max(0, got + 1 - (1 << max(0, cuts - CUTS)))
            yield from self._find_boundary(search, bounds, most)
        if (left := search.num_found - len(search.tiers)) > 0:
            self._counters.add("computed_chunks_total", left)

    def _begin_again(self, search: Search, bounds: Bounds) -> Work[None]:
        """Keep of what is leased what the boundary needs, too, and let go of the rest."""
        old, keep, shape = search.lease, 0, bounds.stretches()
        if shape and bounds.shape and shape[0].columns == bounds.shape[0].columns:
            keep = min(len(search.tiers), shape[0].stop)
        bounds.shape, search.lease = shape, None
        if keep and old is not None:
            search.lease = self._grant(search)
            for start in range(0, keep, SLICE):
                if start:
                    yield None
                # Of a client that has ended meanwhile nothing is leased any more.
                some = old.rows[start : min(start + SLICE, keep)]
                self._leases.extend(search.lease, some)
        del search.tiers[keep:]
        del search.coming[keep:]
        bounds.left += [slot for number, some in search.prepared if number >= keep for slot in some]
        search.prepared = [one for one in search.prepared if one[0] < keep]
        self.release(old)

    def _take(self, search: Search, bounds: Bounds) -> Work[None]:
        """Lease what the boundary needs, head first, as far as it is there and may be had."""
        nothing = Row(())
        for one in bounds.shape:
            search.parts, search.stop = bounds.parts_of(one), one.stop
            search.ended = search.absent = False
            while not (self._step(search) if one.columns else self._pass(search, nothing)):
                yield None
            if len(search.tiers) < one.stop:
                return

    def _pass(self, search: Search, nothing: Row) -> bool:
        """One slice of chunks of which nothing is needed; whether it was the last."""
        count = min(SLICE, search.stop - len(search.tiers))
        if count > 0 and not search.client.ended:
            self._lease(search, [nothing] * count, bytes(count), [0] * count)
        return search.client.ended or len(search.tiers) == search.stop

    def _load_of(self, search: Search, nbytes: int) -> Load:
        load = super()._load_of(search, nbytes)
        if (bounds := search.bounds) is not None:
            load.bounded = frozenset(bounds.parts).difference(bounds.full)
        return load

    def _grant(self, search: Search) -> Lease:
        bounds = search.bounds
        if bounds is None:
            return super()._grant(search)
        return self._leases.grant(search.client, search.orders, bounds.shape, len(bounds.parts))

    def _plan(self, search: Search, bounds: Bounds) -> Work[int]:
        """The boundary that is worth loading, of what is leased or a shorter one."""
        search.num_found = count = len(search.tiers)
        if not self.planning or search.expected_s or not any(search.coming):
            return count

        def lower(most: int) -> Work[int]:
            return (yield from self._longest(search, bounds, most))[0]

        tiers = {backing.name: number for number, backing in enumerate(self._backings, 1)}
        links = [self._movement.link(backing) for backing in self._backings]
        prices = Prices(
            search, bounds, self.locate, self._movement.prepared, lower, tiers, links
        )  # fmt: skip
        best = yield from prices.best(count)
        search.load_s, keep = best.load_s, best.boundary
        decision = "load" if keep == count else "part" if best.load_s else "compute"
        self._counters.add("plans_total", decision=decision)
        for _, slots in [one for one in search.prepared if one[0] >= keep][:1]:
            self._movement.look_again(slots[0])
        return keep

    def _start(self, search: Search, bounds: Bounds) -> Work[None]:
        """Begin to bring what was leased and is not there, here or by who leased it meanwhile."""
        search.parts, left = bounds.parts, [slot for slot in bounds.left if is_wanted(slot)]
        left += [slot for _, some in search.prepared for slot in some if is_wanted(slot)]
        search.prepared = []
        slots = self._foresight.follow(search, left, bounds.needs)
        for number, row in enumerate(search.lease.rows if search.lease is not None else ()):
            if number % SLICE == SLICE - 1:
                yield None
            for slot in row.slots if row.num_filling else ():
                wanted = self._movement.prepared(slot)
                # What a peer is about to have, whoever foresaw it follows.
                if wanted is not None and wanted.stored:
                    slots.append(slot)
        if slots and search.load is None:
            search.load = self._load_of(search, slots[0].nbytes)
        yield from self._bring(search, slots, len(bounds.parts))

    def _note_uses(self, search: Search, bounds: Bounds) -> Work[None]:
        # Tails before heads: what is used last is evicted last.
        for stop in range(len(search.tiers), 0, -SLICE):
            self._note_use(search.keys[max(0, stop - SLICE) : stop])
            if stop > SLICE:
                yield None
        for one in bounds.shape if search.tiers else ():
            needed = set(bounds.parts_of(one)).difference(bounds.full)
            passed = set(bounds.parts).difference(needed, bounds.full)
            count = max(1, NOTE_SLICE // len(bounds.parts))
            for start in range(one.start, one.stop, count):
                if start > one.start:
                    yield None
                keys = search.keys[start : min(start + count, one.stop)]
                self._host.index.note_needs(keys, needed, passed)
                for backing in self._backings:
                    backing.note_needs(keys, needed, passed)
        if search.tiers:
            self.used(search.keys[len(search.tiers) - 1])
