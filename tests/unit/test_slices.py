"""Long requests are answered in slices: others are served meanwhile, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any

import pytest
from tests.support import nodes
from tests.support.nodes import (
    ORDER,
    RAW,
    SLOT,
    GatedTier,
    at_once,
    chunk_keys,
    clear,
    flush,
    make_node,
    match,
    on_node,
    owned,
    release,
    reserve,
    until,
)

from kvstrata.errors import UsageError
from kvstrata.header import NOBODY
from kvstrata.node import answering, matching, searching
from kvstrata.node.common import slices
from kvstrata.node.common.index import Index
from kvstrata.node.common.slices import in_slices
from kvstrata.node.node import Node
from kvstrata.node.operating import clearing
from kvstrata.node.service import movement, scan, write_behind
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.slots import leases, reservations
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.slot import offsets_of_rows
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

ME, YOU = "pid 1", "pid 2"
KEYS = chunk_keys(40)


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few chunks are many."""
    monkeypatch.setattr(slices, "HOLD_S", 0.0)
    monkeypatch.setattr(matching, "SLICE", 4)
    monkeypatch.setattr(answering, "SLICE", 4)
    monkeypatch.setattr(matching, "SLICE_OBJECTS", 3)
    monkeypatch.setattr(matching, "SLICE_STARTS", 3)
    monkeypatch.setattr(matching, "SLICE_LOOKUPS", 4)
    monkeypatch.setattr(searching, "SLICE_KEYS", 8)
    monkeypatch.setattr(clearing, "SLICE", 4)
    monkeypatch.setattr(reservations, "GRANT_SLICE", 4)
    monkeypatch.setattr(reservations, "FINISH_SLICE", 3)
    monkeypatch.setattr(reservations, "KEYS_SLICE", 8)
    monkeypatch.setattr(reservations, "TOUCH_SLICE", 4)
    monkeypatch.setattr(write_behind, "TOUCH_SLICE", 4)
    monkeypatch.setattr(write_behind, "ADD_SLICE", 3)
    monkeypatch.setattr(scan, "HOLD_S", 0.0)
    monkeypatch.setattr(scan, "SLICE", 4)


async def later(answer: Any) -> Any:
    assert isinstance(answer, Awaitable), "it was one slice"
    return await answer


def begin_match(node: Node, client: Client, keys: list[bytes]) -> asyncio.Future[p.Matched]:
    answer = node.match(client, p.Match(1, b"".join(keys), [0], [ORDER], [RAW]))
    assert isinstance(answer, Awaitable)
    return asyncio.ensure_future(answer)


async def some_of_it(client: Client) -> None:
    """Let a match go on until it has leased something."""
    while not client.leased_bytes:
        await asyncio.sleep(0)


async def store(node: Node, client: Client, keys: list[bytes]) -> int:
    request = p.Reserve(1, nodes.NAMESPACE, b"".join(keys), 0, 0, nodes.template())
    reserved = await later(node.reserve(client, request))
    offsets = list(offsets_of(reserved.offsets))
    sums = nodes.write(node, keys, offsets)
    done: p.Done = await later(
        node.commit(client, p.Commit(1, reserved.reservation, b"".join(sums)))
    )
    return done.count


def test_everything_in_slices() -> None:
    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS) == 40
        await flush(node, me)
        found = await later(node.lookup(me, p.Lookup(1, b"".join([*KEYS, bytes(32)]), [0])))
        assert found.tiers == bytes(40) + b"\xff"
        matched = await begin_match(node, me, KEYS)
        assert matched.tiers == bytes(40)
        assert min(offsets_of(matched.offsets)) >= 0
        node.check_integrity()
        release(node, me, matched.lease)
        assert await clear(node, me, KEYS[3:], ["host"]) == 37
        matched = await begin_match(node, me, KEYS)
        assert matched.tiers == bytes(3) + b"\1" * 37
        node.check_integrity()
        arrived = await nodes.arrive(node, me, matched.lease, 39)
        assert arrived.ready == 40
        assert nodes.stored_payload(node, *offsets_of(arrived.offsets)) == nodes.payload(KEYS[-1])
        release(node, me, matched.lease)
        assert await clear(node, me) == 80
        assert node.host.allocated_bytes == 0
        assert await later(node.lookup(me, p.Lookup(1, b"".join(KEYS), [0]))) == p.Found(
            1, b"\xff" * 40
        )

    on_node(test, slots=40, tier=MemoryTier())


def test_a_match_leases_as_it_goes() -> None:
    """What was found cannot be evicted, nor can two pass a cap together."""

    async def test(node: Node) -> None:
        me, you = Client(ME), Client(YOU)
        assert await store(node, me, KEYS[:20]) == 20
        first = begin_match(node, me, KEYS[:20])
        second = begin_match(node, you, KEYS[:20])
        await some_of_it(me)
        assert me.leased_bytes < 20 * SLOT
        node.check_integrity()
        # A writer takes all that is left: of what is not leased yet the tail goes.
        assert min(reserve(node, you, chunk_keys(1, 9))[1]) >= 0
        assert min(reserve(node, you, chunk_keys(4, 8))[1]) >= 0
        matched = await first
        node.check_integrity()
        assert matched.tiers == bytes(15)
        assert (await second).tiers == bytes(15)
        assert me.leased_bytes + you.leased_bytes == 15 * SLOT

    on_node(test, slots=20)


@pytest.mark.parametrize("how", ["clear", "some", "end"])
@pytest.mark.parametrize("target_s", [0.0, 100.0])
def test_what_a_match_has_yet_to_bring_may_be_forgotten(how: str, target_s: float) -> None:
    """Its promotions are made as it goes and begun in the end: some are off by then."""

    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS) == 40
        await flush(node, me)
        await clear(node, me, tiers=["host"])
        node.backings[0].load_target_s = target_s
        matching = begin_match(node, me, KEYS)
        await some_of_it(me)
        if how == "end":
            node.end(me)
            assert (await matching).lease == 0
        else:
            await clear(node, me, KEYS[:2] if how == "some" else None, ["host"])
            matched = await matching
            assert len(matched.tiers) == 40
            arrived = await nodes.arrive(node, me, matched.lease, 39)
            assert arrived.failed
            release(node, me, matched.lease)
        await until(lambda: not list(node.movement.under_way()))
        assert not me.leased_bytes
        node.check_integrity()

    on_node(test, slots=40, tier=MemoryTier())


@pytest.mark.parametrize("keep", [0, 1])
def test_a_lease_is_not_released_before_it_is_granted(keep: int) -> None:
    """Whoever guesses its number would otherwise be leased what never ends."""

    async def test(node: Node) -> None:
        me, you = Client(ME), Client(YOU)
        assert await store(node, you, KEYS) == 40
        matching = begin_match(node, me, KEYS)
        await some_of_it(me)
        (number,) = me.leases
        with pytest.raises(UsageError, match="under way"):
            release(node, me, number, keep)
        matched = await matching
        assert (matched.lease, len(matched.tiers)) == (number, 40)
        assert len(offsets_of(matched.offsets)) == 40
        node.check_integrity()
        node.end(me)
        assert not me.leased_bytes
        node.check_integrity()

    on_node(test, slots=40)


@pytest.mark.parametrize(("below", "step"), [(False, 4), (True, 3)])
def test_a_slice_leases_as_many_as_it_may_and_no_more(below: bool, step: int) -> None:
    """As many rows that host memory knows, or objects that are to be promoted."""

    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS[:12]) == 12
        await flush(node, me)
        if below:
            await clear(node, me, tiers=["host"])
        else:
            release(node, me, (await begin_match(node, me, KEYS[:12])).lease)  # makes the rows
        begun = begin_match(node, me, KEYS[:12])
        steps = {0}
        while not begun.done():
            await asyncio.sleep(0)
            steps.add(me.leased_bytes // SLOT)
        assert steps == set(range(0, 13, step))
        release(node, me, begun.result().lease)

    on_node(test, slots=20, tier=MemoryTier())


def test_a_client_that_dies_in_the_middle_keeps_nothing() -> None:
    async def test(node: Node) -> None:
        me, dead = Client(ME), Client(YOU)
        assert await store(node, me, KEYS) == 40
        begun = begin_match(node, dead, KEYS)
        await some_of_it(dead)
        node.end(dead)
        assert (await begun).lease == 0
        assert (dead.leased_bytes, node.leases.leased_bytes, len(node.leases)) == (0, 0, 0)
        node.check_integrity()
        dead = Client(YOU)
        request = p.Reserve(1, nodes.NAMESPACE, b"".join(chunk_keys(8, 9)), 0, 0, nodes.template())
        begun_reserve = node.reserve(dead, request)
        assert dead.reserved_bytes
        node.end(dead)
        reserved = await later(begun_reserve)
        assert list(offsets_of(reserved.offsets))[4:] == [p.REFUSED] * 4
        await until(lambda: not dead.reserved_bytes)
        assert (dead.reserved_bytes, len(node.reservations)) == (0, 0)
        node.check_integrity()

    on_node(test, slots=60)


def test_a_long_prefix_costs_its_writer_slices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what it names, its uses are noted and its slots are listed a few at a time, too."""
    sizes: dict[str, list[int]] = {"split": [], "touch": [], "rows": []}
    split, touch, listed = p.split, Index.touch, offsets_of_rows

    def noting_split(packed: bytes, size: int) -> list[bytes]:
        sizes["split"].append(len(packed) // size)
        return split(packed, size)

    def noting_touch(index: Index[Any], keys: list[bytes]) -> None:
        sizes["touch"].append(len(keys))
        touch(index, keys)

    def noting_rows(rows: Any, orders: frozenset[str]) -> bytes:
        sizes["rows"].append(len(rows))
        return listed(rows, orders)

    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS[:38]) == 38
        await flush(node, me)
        request = p.Reserve(1, nodes.NAMESPACE, b"".join(KEYS), 38, 0, nodes.template())
        monkeypatch.setattr(p, "split", noting_split)
        monkeypatch.setattr(Index, "touch", noting_touch)
        monkeypatch.setattr(leases, "offsets_of_rows", noting_rows)
        reserved = await later(node.reserve(me, request))
        assert max(sizes["split"]) == 8
        assert sum(sizes["split"]) == 40
        sums = nodes.write(node, KEYS[38:], list(offsets_of(reserved.offsets)))
        commit = p.Commit(1, reserved.reservation, b"".join(sums))
        assert (await later(node.commit(me, commit))).count == 2
        await flush(node, me)
        # In host memory what the writer had read, in the tier what it wrote besides.
        assert max(sizes["touch"]) == 4
        assert sum(sizes["touch"]) == 38 + 40
        # Heads are used last, so tails are evicted first.
        assert list(node.host.index._policy.keys())[-1] == KEYS[0]
        assert list(nodes.owned(node).index._policy.keys())[-1] == KEYS[0]
        matched = await begin_match(node, me, KEYS)
        assert len(offsets_of(matched.offsets)) == 40
        assert min(offsets_of(matched.offsets)) >= 0
        assert (max(sizes["rows"]), sum(sizes["rows"])) == (4, 40)
        release(node, me, matched.lease)

    on_node(test, slots=40, tier=MemoryTier())


def test_a_flush_waits_for_a_commit_that_still_notes_uses() -> None:
    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS[:39]) == 39
        await flush(node, me)
        request = p.Reserve(1, nodes.NAMESPACE, b"".join(KEYS), 39, 0, nodes.template())
        reserved = await later(node.reserve(me, request))
        sums = nodes.write(node, KEYS[39:], list(offsets_of(reserved.offsets)))
        commit = p.Commit(1, reserved.reservation, b"".join(sums))
        answer = asyncio.ensure_future(later(node.commit(me, commit)))
        await asyncio.sleep(0)
        assert node.host.get(KEYS[39], 0) is not None
        assert not answer.done()
        await flush(node, me)
        assert node.backings[0].find(KEYS[39], 0, None) is not None
        await answer

    on_node(test, slots=40, tier=MemoryTier())


@pytest.mark.parametrize("how", ["flush", "clear", "some"])
def test_what_a_commit_has_yet_to_queue_is_on_its_way_too(how: str) -> None:
    """Fails where a flush or a clear sees only what the slices so far have queued."""

    async def test(node: Node) -> None:
        me, keys, (behind,) = Client(ME), KEYS[:20], node.movement.behind
        storing = asyncio.ensure_future(store(node, me, keys))
        while not behind._adding:
            await asyncio.sleep(0)
        assert behind.queued_bytes == 20 * SLOT
        node.check_integrity()
        tier = node.backings[0].name
        if how == "flush":
            await flush(node, me)
            assert [node.backings[0].find(key, 0, None) for key in keys] == [SLOT] * 20
        else:
            left = {key for key, _ in next(iter(behind._adding)).left}
            assert keys[0] in left
            await clear(node, me, keys[:5] if how == "some" else None, [tier])
        assert await storing == 20
        await flush(node, me)
        node.check_integrity()
        assert not behind.queued_bytes
        assert all(node.host.get(key, 0) is not None for key in keys)
        if how != "flush":
            gone = keys[:5] if how == "some" else keys
            assert not any(node.backings[0].find(key, 0, None) for key in gone)
            assert owned(node).index.num_objects == (15 if how == "some" else 0)

    on_node(test, slots=20, tier=GatedTier(), num_threads=1)


@pytest.mark.parametrize("tiers", [["host", "memory"], ["memory"]])
@pytest.mark.parametrize("how", ["all", "some", "owner", "aged"])
def test_what_a_commit_has_published_is_cleared_before_it_ends(how: str, tiers: list[str]) -> None:
    """Fails where a commit writes behind what was cleared between two of its slices.

    Or publishes it: ``aged`` fails where only what was committed before is held against its age.
    """

    async def test(node: Node) -> None:
        me, keys, gone = Client(ME), KEYS[:20], KEYS[14:20] if how == "some" else KEYS[:20]
        # So many that the slots of all of them are not given back before the commit ends.
        assert await store(node, me, chunk_keys(60, 7)) == 60
        await flush(node, me)
        storing = asyncio.ensure_future(store(node, me, keys))
        while node.host.get(keys[-1], 0) is None:
            await asyncio.sleep(0)
        assert node.host.get(keys[0], 0) is None
        request = p.Clear(1, None, tiers)
        if how == "some":
            request = p.Clear(1, b"".join(gone), tiers)
        elif how == "owner":
            request = p.Clear(1, None, tiers, owner=NOBODY)
        elif how == "aged":
            request = p.Clear(1, None, tiers, before_ns=time.time_ns())
        clearing = asyncio.ensure_future(later(node.clear(me, request)))
        await storing
        await clearing
        await flush(node, me)
        assert not any(node.backings[0].find(key, 0, None) for key in gone)
        if "host" in tiers:
            assert not any(node.host.get(key, 0) for key in gone)

    on_node(test, slots=80, tier=MemoryTier(), num_threads=1)


def test_what_comes_amid_a_match_in_another_order_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails where an answer tells the place of what its reader cannot read."""
    tier = MemoryTier()
    monkeypatch.setattr(tier, "close", lambda: None)

    async def read_none(*_: Any) -> None:
        pass

    monkeypatch.setattr(OwnedBacking, "read_headers", read_none)

    async def fill(node: Node) -> None:
        assert await store(node, Client(ME), KEYS[:12]) == 12
        await flush(node, Client(ME))

    async def test(node: Node) -> None:
        # What a scan has found is in an order that nobody knows before it is read.
        await until(lambda: owned(node).index.num_objects == 12)
        me, keys = Client(ME), b"".join(KEYS[:12])
        answer = node.match(me, p.Match(1, keys, [0], [nodes.OTHER], [RAW]))
        assert isinstance(answer, Awaitable)
        answering = asyncio.ensure_future(answer)
        while not answering.done():
            time.sleep(0.002)  # so that each object comes before the next slice
            await asyncio.sleep(0)
        matched = answering.result()
        await until(lambda: node.leases[matched.lease].failed)
        assert set(offsets_of(matched.offsets)) == {p.ARRIVING}
        release(node, me, matched.lease)

    on_node(fill, slots=40, tier=tier)
    on_node(test, slots=40, tier=tier)


def test_a_scan_enters_a_few_objects_at_a_time() -> None:
    """Fails where others wait for a whole batch of what a tier's scan found."""
    tier = MemoryTier()

    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS) == 40
        await flush(node, me)
        later = nodes.make_backing(tier)
        running, steps = asyncio.ensure_future(later.run()), [0]
        while not running.done():
            await asyncio.sleep(0)
            steps.append(later.index.num_objects)
        assert sorted(set(steps)) == list(range(0, 41, 4))
        later.check_integrity()

    on_node(test, slots=40, tier=tier)


def test_the_end_of_a_writer_is_in_slices() -> None:
    """Its slots are free soon, and what else it had counts as long as it has it."""

    async def test(node: Node) -> None:
        me, you = Client(ME), Client(YOU)
        request = p.Reserve(1, nodes.NAMESPACE, b"".join(KEYS), 0, 0, nodes.template())
        reserved = await later(node.reserve(me, request))
        node.end(me)
        left = node.host.allocated_bytes
        assert 30 * SLOT < left < 40 * SLOT
        assert me.reserved_bytes == left
        node.check_integrity()
        commit = p.Commit(1, reserved.reservation, b"\1" * 640)
        assert at_once(node.commit(me, commit)).count == 0
        await until(lambda: not node.host.allocated_bytes)
        assert not me.reserved_bytes
        node.check_integrity()
        assert await store(node, you, KEYS) == 40

    on_node(test, slots=40)


def test_a_commit_is_seen_as_it_goes_and_ends_once() -> None:
    async def test(node: Node) -> None:
        me = Client(ME)
        request = p.Reserve(1, nodes.NAMESPACE, b"".join(KEYS[:10]), 0, 0, nodes.template())
        reserved = await later(node.reserve(me, request))
        offsets = list(offsets_of(reserved.offsets))
        sums = b"".join(nodes.write(node, KEYS[:10], offsets))
        committing = asyncio.ensure_future(
            later(node.commit(me, p.Commit(1, reserved.reservation, sums)))
        )
        assert at_once(node.commit(me, p.Commit(2, reserved.reservation, sums))).count == 0
        node.check_integrity()
        # Tails come first, so that they leave first; a head that is not there is no match.
        assert [node.host.get(key, 0) is not None for key in KEYS[:10]] == [False] * 7 + [True] * 3
        assert match(node, me, KEYS[:2]).lease == 0
        flushed = asyncio.ensure_future(flush(node, me))
        # What is cleared before it is published is not published.
        assert await clear(node, me, [KEYS[0], KEYS[8]]) == 1
        node.end(me)  # too late to take the commit back
        await flushed
        assert owned(node).index.num_objects == 8
        done: p.Done = await committing
        assert done.count == 9
        assert [node.host.get(key, 0) is not None for key in KEYS[:10]] == [
            number not in (0, 8) for number in range(10)
        ]

    on_node(test, slots=20, tier=MemoryTier())


@pytest.mark.parametrize("chosen", [True, False])
def test_a_clear_is_exact_whatever_is_asked_meanwhile(chosen: bool) -> None:
    """Each chunk goes in all tiers at once, and at the end all of them have gone."""
    draw = random.Random(3)

    async def test(node: Node) -> None:
        me, you = Client(ME), Client(YOU)
        assert await store(node, me, KEYS) == 40
        await flush(node, me)
        leased = await begin_match(node, you, KEYS[:5])
        clearing = asyncio.ensure_future(clear(node, me, KEYS if chosen else None))
        others: list[int] = []
        while not clearing.done():
            await asyncio.sleep(0)
            node.check_integrity()
            key = draw.choice(KEYS)
            if matched := match(node, me, [key]).lease:
                assert chosen
                assert node.host.get(key, 0) is not None
                release(node, me, matched)
            others += [
                one for one in reserve(node, you, chunk_keys(1, len(others) + 1))[1] if one >= 0
            ]
        assert clearing.result() == 80
        assert await later(node.lookup(me, p.Lookup(1, b"".join(KEYS), [0]))) == p.Found(
            1, b"\xff" * 40
        )
        assert others
        assert node.host.allocated_bytes == (5 + len(others)) * SLOT
        for number, offset in enumerate(offsets_of(leased.offsets)):
            assert nodes.stored_payload(node, offset) == nodes.payload(KEYS[number])
        release(node, you, leased.lease)
        assert node.host.allocated_bytes == len(others) * SLOT

    on_node(test, slots=80, tier=MemoryTier())


def test_room_that_a_clear_has_yet_to_give_back_is_there_for_who_needs_it() -> None:
    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS) == 40
        clearing = node.clear(me, p.Clear(1))
        assert node.host.allocated_bytes == 40 * SLOT
        assert min(reserve(node, me, chunk_keys(4, 9))[1]) >= 0
        node.check_integrity()
        assert await asyncio.wait_for(clearing, 5) == p.Done(1, 40)  # ten slices, no waits
        assert node.host.allocated_bytes == 4 * SLOT

    on_node(test, slots=40)


def test_promotions_in_slices_are_one_load() -> None:
    """So that its levels are chosen for all that is left of it."""
    tier = GatedTier()

    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS) == 40
        await flush(node, me)
        await clear(node, me, tiers=["host"])
        owned(node).load_target_s = 100.0
        tier.shut("read")
        matched = await begin_match(node, me, KEYS)
        lane = node.movement._lanes[owned(node).name]
        (stream,) = lane.streams
        assert len(stream._sizes) == 40
        tier.open()
        assert (await nodes.arrive(node, me, matched.lease, 39)).ready == 40
        await until(lambda: stream.ended)

    on_node(test, slots=40, tier=tier)


def test_what_a_match_promotes_and_what_it_answers_are_not_one_slice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(node: Node) -> None:
        me, steps, step = Client(ME), dict[str, int](), 0
        assert await store(node, me, KEYS) == 40
        await flush(node, me)
        await clear(node, me, tiers=["host"])
        use, of = node.host.index.touch, node._matcher._answers.of

        def noted(what: str, work: Callable[..., Any], argument: Any) -> Any:
            steps[what] = step
            return work(argument)

        monkeypatch.setattr(node.host.index, "touch", partial(noted, "use", use))
        monkeypatch.setattr(node._matcher._answers, "of", partial(noted, "answer", of))
        under_way = begin_match(node, me, KEYS)
        while not under_way.done():
            await asyncio.sleep(0)
            step += 1
        assert steps["use"] < steps["answer"]
        release(node, me, under_way.result().lease)

    on_node(test, slots=40, tier=MemoryTier())


def test_many_promotions_are_called_off_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them begins meanwhile, and what is wanted again goes on."""
    monkeypatch.setattr(movement, "CALL_OFF_SLICE", 5)
    tier = GatedTier()

    async def test(node: Node) -> None:
        me, you = Client(ME), Client(YOU)
        assert await store(node, me, KEYS) == 40
        await flush(node, me)
        await clear(node, me, tiers=["host"])
        tier.shut("read")
        matched = await begin_match(node, me, KEYS)
        release(node, me, matched.lease)
        node.check_integrity()
        assert node.counters.get("promotions_total", outcome="unwanted") == 5
        again = match(node, you, KEYS[:3])
        # No read has to end for it: those that are called off have not begun.
        await until(lambda: node.counters.get("promotions_total", outcome="unwanted") >= 30)
        tier.open()
        assert (await nodes.arrive(node, you, again.lease, 2)).ready == 3
        await until(lambda: not list(node.movement.under_way()))
        assert node.counters.get("promotions_total", outcome="unwanted") == 37
        assert node.host.allocated_bytes == 3 * SLOT
        assert me.leased_bytes + you.leased_bytes == 3 * SLOT

    on_node(test, slots=40, tier=tier)


def test_work_in_one_slice_is_done_at_once_and_errors_are_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short() -> Generator[None, None, int]:
        if not KEYS:
            yield
        return 7

    def long(fail: bool) -> Generator[None, None, int]:
        for _ in range(3):
            done.append("a slice")
            yield
        if fail:
            raise ValueError("in the end")
        return 8

    async def run() -> None:
        assert in_slices(short()) == 7
        assert await later(in_slices(long(False))) == 8
        with pytest.raises(ValueError, match="in the end"):
            await later(in_slices(long(True)))
        monkeypatch.setattr(slices, "HOLD_S", 60.0)
        assert in_slices(long(False)) == 8
        with pytest.raises(ValueError, match="in the end"):
            in_slices(long(True))

    done: list[str] = []
    asyncio.run(run())
    assert len(done) == 12


def test_a_match_that_is_called_off_leaves_nothing() -> None:
    async def main() -> None:
        node = make_node(40)
        await node.start()
        me = Client(ME)
        assert await store(node, me, KEYS) == 40
        begun = begin_match(node, me, KEYS)
        await some_of_it(me)
        begun.cancel()
        await asyncio.gather(begun, return_exceptions=True)
        assert (me.leased_bytes, len(node.leases)) == (0, 0)
        node.check_integrity()
        await node.stop()

    asyncio.run(main())


def test_of_more_parts_than_a_slice_takes_every_slice_takes_a_chunk() -> None:
    async def test(node: Node) -> None:
        me, parts = Client(ME), list(range(6))
        keys = chunk_keys(3, 5)
        for part in parts:
            assert nodes.store(node, me, keys[:2], part=part) == 2
        for asked, found in ((keys, 2), (keys[2:], 0)):
            answer = node.match(me, p.Match(1, b"".join(asked), parts, [ORDER], [RAW] * 6))
            matched = await answer if isinstance(answer, Awaitable) else answer
            assert len(matched.tiers) == found

    on_node(test, slots=12)


def asked(node: Node, client: Client, keys: list[bytes]) -> asyncio.Future[p.Matched]:
    """What the server does with a match."""
    answer = node.handle(client, p.Match(1, b"".join(keys), [0], [ORDER], [RAW]))
    assert isinstance(answer, Awaitable)
    return asyncio.ensure_future(answer)  # type: ignore[arg-type]


@pytest.fixture
def released_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SLICE_RELEASED", 3)


@pytest.mark.usefixtures("released_slowly")
@pytest.mark.parametrize("keep", [-(1 << 60), 0, 5])
def test_a_lease_ends_in_slices(keep: int) -> None:
    """Fails where it ends at once, or never."""

    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS) == 40
        lease = (await asked(node, me, KEYS)).lease
        node.handle(me, p.Release(lease, keep))
        assert 20 * SLOT < me.leased_bytes < 40 * SLOT
        node.check_integrity()
        await until(lambda: me.leased_bytes == max(0, keep) * SLOT)
        assert len(node.leases) == bool(keep > 0)

    on_node(test, slots=40)


@pytest.mark.usefixtures("released_slowly")
def test_what_a_client_asks_next_finds_its_lease_ended() -> None:
    """Fails where a cap counts what its process has said that it needs no more."""

    async def test(node: Node) -> None:
        me = Client(ME)
        also_me = Client(ME, me.holder)
        assert await store(node, me, KEYS[:20]) == 20
        assert await store(node, me, KEYS[20:]) == 20
        lease = (await asked(node, me, KEYS[:20])).lease
        node.handle(me, p.Release(lease, 0))
        assert me.leased_bytes
        answer = asked(node, also_me, KEYS[20:])
        assert node.leases.get(lease) is None
        assert (await answer).tiers == bytes(20)
        assert me.leased_bytes == 20 * SLOT

    on_node(test, slots=40, per_client=0.5)


@pytest.mark.usefixtures("released_slowly")
def test_who_has_died_holds_nothing_soon() -> None:
    async def test(node: Node) -> None:
        me = Client(ME)
        assert await store(node, me, KEYS) == 40
        await asked(node, me, KEYS)
        node.end(me)
        assert me.leased_bytes
        node.check_integrity()
        await until(lambda: not me.leased_bytes)
        assert len(node.leases) == 0

    on_node(test, slots=40)
