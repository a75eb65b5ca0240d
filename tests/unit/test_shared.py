"""A tier that others write to: asked in time, never the truth, one epoch for all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.support.fleets import Fleet, FleetTier, make_member
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    OTHER,
    RAW,
    SLOT,
    GatedTier,
    arrive,
    at_once,
    chunk_keys,
    clear,
    flush,
    payload,
    release,
    reserve,
    store,
    stored_payload,
    until,
    write,
)

from kvstrata.errors import TierUnavailable, UsageError
from kvstrata.node.coding.choosing import Always, Exact
from kvstrata.node.node import Node
from kvstrata.node.service import hints
from kvstrata.node.service.names import Where
from kvstrata.node.service.shared import SharedBacking
from kvstrata.node.slots.clients import Client, Holder
from kvstrata.parts import PORTABLE
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

ME = Client("pid 1")
SHARED = 1


@pytest.fixture(autouse=True)
def nothing_of_the_last_test() -> None:
    ME.__init__("pid 1")  # type: ignore[misc]


async def ask(
    node: Node,
    keys: Sequence[bytes],
    parts: Sequence[int] = (0,),
    orders: Sequence[str] = (ORDER, PORTABLE),
    namespace: bytes = NAMESPACE,
) -> p.Matched:
    """A match, as an engine asks."""
    answer = node.match(ME, p.Match(
        1, b"".join(keys), list(parts), list(orders), [RAW] * len(parts), namespace=namespace
    ))  # fmt: skip
    return await answer if isinstance(answer, Awaitable) else answer


async def get(node: Node, keys: Sequence[bytes], parts: Sequence[int] = (0,)) -> list[int]:
    """Match, load and compare; the tier of each chunk that came."""
    matched = await ask(node, keys, parts)
    offsets, ready = list(offsets_of(matched.offsets)), 0
    while ready < len(matched.tiers):
        arrived = await arrive(node, ME, matched.lease, ready)
        offsets[ready * len(parts) : arrived.ready * len(parts)] = offsets_of(arrived.offsets)
        ready = arrived.ready
        if arrived.failed:
            break
    for i in range(ready * len(parts)):
        key, part = keys[i // len(parts)], parts[i % len(parts)]
        assert stored_payload(node, offsets[i]) == payload(key, part), "other bytes came back"
    if matched.lease:
        release(node, ME, matched.lease)
    return list(matched.tiers[:ready])


async def begin(*nodes: Node, known: bool = True) -> None:
    """Start some nodes; return once all know the epochs of their stores, and how fast they are."""
    for node in nodes:
        await node.start()
    backings = [backing for node in nodes for backing in node.backings]
    await until(lambda: not known or all(one.readable and one._timed for one in backings))


def counted(node: Node, name: str) -> float:
    return sum(count for one, count in node.counters.snapshot().items() if one.startswith(name))


def of_fleet(
    test: Callable[..., Coroutine[Any, Any, None]],
    *,
    members: int = 2,
    fleet: Fleet | None = None,
    round_objects: int = 1 << 30,
    **options: Any,
) -> None:
    """Run a test with some nodes of one fleet, on one loop, once all of them know the epoch."""

    async def main() -> None:
        # What an earlier test left leased is no node's any more.
        ME.holder, ME.leases, ME.reservations = Holder(), set(), set()
        shared = fleet or Fleet()
        nodes = [
            make_member(FleetTier(shared, round_objects=round_objects), **options)
            for _ in range(members)
        ]
        try:
            await begin(*nodes, known=not shared.dead)
            await asyncio.wait_for(test(shared, *nodes), 60)
            shared.open()
            await until(lambda: not any(node.movement.queued_bytes for node in nodes))
            for node in nodes:
                node.check_integrity()
        finally:
            shared.open()
            for node in nodes:
                await node.stop(drain_s=1.0)

    asyncio.run(main())


class TestWhatAFleetHas:
    def test_what_one_stored_another_gets(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(6)
            store(a, ME, keys)
            await flush(a, ME)
            assert await get(b, keys) == [SHARED] * 6
            assert await get(b, keys) == [0] * 6, "and then it has it itself"

        of_fleet(test)

    def test_one_round_of_questions_for_any_length(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(30)
            store(a, ME, keys[:20])
            await flush(a, ME)
            fleet.asked.clear()
            assert await get(b, keys) == [SHARED] * 20
            assert fleet.asked == [60], "30 chunks in two orders"

        of_fleet(test)

    def test_behind_what_the_node_has_itself(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(9)
            store(b, ME, keys[:3])
            await flush(b, ME)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.asked.clear()
            assert await get(b, keys) == [0] * 3 + [SHARED] * 6
            assert fleet.asked == [12], "nobody asked for what is here"

        of_fleet(test)

    def test_between_what_an_owned_tier_has(self) -> None:
        """Here and there in turns: the fastest tier that has a chunk gives it."""

        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(9)
            store(a, ME, keys)
            await flush(a, ME)
            for node in (a, b):
                await clear(node, ME, tiers=["host", "memory"])
            assert await get(b, keys[:3]) == [2] * 3
            await flush(b, ME)
            await clear(b, ME, tiers=["host"])
            assert await get(b, keys) == [1] * 3 + [2] * 6

        of_fleet(test, owned=GatedTier())

    def test_a_hole_ends_it(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(8)
            store(a, ME, keys)
            await flush(a, ME)
            name = Where(fleet.current.number, NAMESPACE, ORDER).name(keys[5], 0)
            assert fleet.objects.delete([name]) == [Outcome.HIT]
            assert await get(b, keys) == [SHARED] * 5

        of_fleet(test)

    def test_a_hole_that_another_tier_fills_does_not(self) -> None:
        """Whatever left a hole, the one answer says of the chunks behind it, too."""

        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(8)
            store(a, ME, keys)
            await flush(a, ME)
            for node in (a, b):
                await clear(node, ME, tiers=["host", "memory"])
            assert await get(b, keys) == [2] * 8
            await flush(b, ME)
            await clear(b, ME, [*keys[:3], *keys[4:]], ["memory"])
            await clear(b, ME, tiers=["host"])
            name = Where(fleet.current.number, NAMESPACE, ORDER).name(keys[3], 0)
            assert fleet.objects.delete([name]) == [Outcome.HIT]
            shared = b.backings[1]
            assert isinstance(shared, SharedBacking)
            shared._hints.clear()
            fleet.asked.clear()
            assert await get(b, keys) == [2] * 3 + [1] + [2] * 4
            assert fleet.asked == [16], "in one round"

        of_fleet(test, owned=GatedTier())

    def test_all_parts_of_a_chunk_or_none(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(4)
            store(a, ME, keys, part=0)
            store(a, ME, keys[:2], part=1)
            await flush(a, ME)
            assert await get(b, keys, parts=[0, 1]) == [SHARED] * 2

        of_fleet(test)

    def test_engines_of_two_kinds_keep_theirs_side_by_side(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys, order=OTHER)
            await flush(a, ME)
            assert (await ask(b, keys)).lease == 0, "of no use to this one"
            store(b, ME, keys)
            await flush(b, ME)
            assert len(fleet.names) == 6
            await clear(a, ME, tiers=["host"])
            assert await get(a, keys) == [SHARED] * 3
            await clear(a, ME, tiers=["host"])
            assert len((await ask(a, keys, orders=[OTHER, PORTABLE])).tiers) == 3

        of_fleet(test)

    def test_without_a_namespace_nobody_is_asked(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.asked.clear()
            assert (await ask(b, keys, namespace=b"")).lease == 0
            assert not fleet.asked
            with pytest.raises(UsageError, match="a namespace of 5 bytes"):
                await ask(b, keys, namespace=b"12345")

        of_fleet(test)

    def test_a_lookup_asks_too(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(4)
            store(a, ME, keys[:3])
            await flush(a, ME)
            request = p.Lookup(1, b"".join(keys), [0], [ORDER], NAMESPACE)
            found = b.lookup(ME, request)
            assert isinstance(found, Awaitable)
            assert (await found).tiers == bytes([SHARED] * 3 + [p.ABSENT])

        of_fleet(test)

    def test_an_encoded_object_is_decoded(self) -> None:
        from kvstrata.codecs import codec_named

        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            held = sum(found.nbytes for batch in fleet.objects.scan() for found in batch)
            assert held < 3 * SLOT
            assert await get(b, keys) == [SHARED] * 3

        of_fleet(test, choice=Always(codec_named("lossless")))

    def test_exact_measures_the_link(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            backing = a.backings[0]
            await until(lambda: backing.place() is not None)
            await until(lambda: b.backings[0].place() is not None)
            assert not fleet.names, "what they wrote for that is gone"

        of_fleet(test, choice=Exact())


class TestGalloping:
    @pytest.mark.parametrize("there", [0, 1, 7, 39, 40])
    @pytest.mark.parametrize("order", [ORDER, PORTABLE])
    def test_the_end_of_a_prompt_in_few_calls(self, there: int, order: str) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(40)
            if there:
                store_portable = order == PORTABLE
                if store_portable:
                    store_in_portable(a, keys[:there])
                else:
                    store(a, ME, keys[:there])
                await flush(a, ME)
            fleet.asked.clear()
            matched = await ask(b, keys)
            assert len(matched.tiers) == there
            assert max(fleet.asked) <= 8
            assert len(fleet.asked) <= 4, "40 chunks, 8 calls a round"
            assert counted(b, "lookup_rounds_total") == len(fleet.asked)

        of_fleet(test, round_objects=8, slots=100)

    def test_what_it_found_comes(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(30)
            for part in (0, 1):
                store(a, ME, keys[:20], part=part)
            await flush(a, ME)
            assert await get(b, keys, parts=[0, 1]) == [SHARED] * 20

        of_fleet(test, round_objects=8, slots=100)

    def test_a_hole_cuts_the_load_there(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(30)
            store(a, ME, keys)
            await flush(a, ME)
            where = Where(fleet.current.number, NAMESPACE, ORDER)
            fleet.objects.delete([where.name(keys[10], 0)])
            assert await get(b, keys) == [SHARED] * 10
            assert await get(b, keys) == [0] * 10, "found out, and not promised again"

        of_fleet(test, round_objects=8, slots=100)


def store_in_portable(node: Node, keys: Sequence[bytes]) -> None:
    """What a lossy tier of another node would have kept."""
    request = p.Reserve(
        1, NAMESPACE, b"".join(keys), 0, 0,
        p.Template("portable", "", "bfloat16", [1, 1, 1, 1, RAW // 2], 128, RAW),
    )  # fmt: skip
    reserved = at_once(node.reserve(ME, request))
    sums = write(node, keys, offsets_of(reserved.offsets))
    at_once(node.commit(ME, p.Commit(1, reserved.reservation, b"".join(sums))))


class TestInTime:
    def test_a_slow_store_still_hits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is known to be far away, and waited for longer than the timeout says."""
        monkeypatch.setattr("kvstrata.node.service.shared.LONGEST_S", 60.0)

        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys, far = chunk_keys(3), b.backings[0]
            assert isinstance(far, SharedBacking)
            assert far.patience_s == 1.5 * far._presence.round_s >= 0.06, "as it was timed"
            far._presence.round_s = 30.0  # nor has a busy machine more than 45 s to answer in
            store(a, ME, keys)
            await flush(a, ME)
            fleet.shut("stat")
            asking = asyncio.ensure_future(get(b, keys))
            await asyncio.sleep(2 * far.lookup_timeout_s)
            assert not asking.done()
            fleet.open()
            assert await asking == [SHARED] * 3

        fleet = Fleet(lasts_s=600.0)  # the store is timed once
        fleet.delay_s = 0.04
        of_fleet(test, fleet=fleet, lookup_timeout_s=0.02)

    def test_a_late_word_is_there_for_the_next(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.shut("stat")
            begun = time.monotonic()
            assert (await ask(b, keys)).lease == 0
            assert 0.04 < time.monotonic() - begun < 0.5
            assert counted(b, "late_lookups_total") == 1
            fleet.open()
            await until(lambda: b.backings[0].find(keys[2], 0, [ORDER]) is not None)
            fleet.asked.clear()
            assert await get(b, keys) == [SHARED] * 3
            assert not fleet.asked, "a fresh hint needs no question"

        of_fleet(test, lookup_timeout_s=0.05, fleet=Fleet(lasts_s=3.0))

    def test_others_are_served_meanwhile(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            fleet.shut("stat")
            slow = asyncio.ensure_future(ask(a, chunk_keys(3, 7)))
            await asyncio.sleep(0)
            assert len((await ask(a, keys)).tiers) == 3
            assert not slow.done()
            await slow

        of_fleet(test, lookup_timeout_s=0.2, fleet=Fleet(lasts_s=3.0))

    def test_a_client_that_died_meanwhile_gets_nothing(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.shut("stat")
            dead = Client("pid 9")
            request = p.Match(1, b"".join(keys), [0], [ORDER], [RAW], namespace=NAMESPACE)
            answer = b.match(dead, request)
            assert isinstance(answer, Awaitable)
            asking = asyncio.ensure_future(answer)
            await asyncio.sleep(0.01)
            b.end(dead)
            fleet.open()
            assert (await asking).lease == 0
            assert not dead.leases
            assert b.host.allocated_bytes == 0

        of_fleet(test)

    def test_all_are_asked_at_the_same_time_and_the_fast_one_is_enough(self) -> None:
        async def main() -> None:
            near, far = Fleet(lasts_s=5.0), Fleet(lasts_s=5.0)
            tiers = FleetTier(near, "near"), FleetTier(far, "far")
            a, b = make_member(*tiers), make_member(*tiers)
            await begin(a, b)
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            far.shut("stat")
            begun = time.monotonic()
            assert await get(b, keys) == [1] * 3
            assert time.monotonic() - begun < 0.9, "nobody waited for the far one"
            await until(lambda: len(far.asked) > 0)
            far.open()
            near.objects.clear()
            await clear(b, ME, tiers=["host"])
            b.backings[0]._hints.clear()  # type: ignore[attr-defined]
            assert await get(b, keys) == [2] * 3
            for node in (a, b):
                await node.stop(drain_s=1.0)

        asyncio.run(main())

    def test_the_fastest_that_has_it_gives_it_whoever_answers_first(self) -> None:
        async def main() -> None:
            first, near, far = fleets = [Fleet(lasts_s=5.0) for _ in range(3)]
            tiers = [FleetTier(fleet, f"store {i}") for i, fleet in enumerate(fleets)]
            a, b = [make_member(*tiers, lookup_timeout_s=5.0) for _ in range(2)]
            await begin(a, b)
            keys = chunk_keys(4)
            store(a, ME, keys)
            await flush(a, ME)
            where = Where(first.current.number, NAMESPACE, ORDER)
            first.objects.delete([where.name(key, 0) for key in keys[1:]])
            first.shut("stat")
            near.shut("stat")
            getting = asyncio.ensure_future(get(b, keys))
            await until(lambda: len(b.backings[2]._hints) == 4)  # type: ignore[attr-defined]
            first.open()
            await until(lambda: len(b.backings[0]._hints) == 1)  # type: ignore[attr-defined]
            near.open()
            assert await getting == [1, 2, 2, 2]
            assert far.asked
            for node in (a, b):
                await node.stop(drain_s=1.0)

        asyncio.run(main())


class TestWrittenOnce:
    def test_what_is_there_is_not_written_again(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(5)
            store(a, ME, keys[:3])
            await flush(a, ME)
            before = counted(a, "tier_write_bytes_total")
            assert before == 3 * SLOT
            store(b, ME, keys)
            fleet.asked.clear()
            await flush(b, ME)
            assert fleet.asked == [10], "one batch for the commit"
            assert counted(b, "tier_write_bytes_total") == 2 * SLOT
            assert counted(b, 'write_behind_skipped_total{tier="fleet",why="there"}') == 3
            assert await get(a, keys) == [0] * 3 + [SHARED] * 2

        of_fleet(test)

    def test_two_who_write_at_once_leave_one(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(5)
            fleet.shut("write")
            store(a, ME, keys)
            store(b, ME, keys)
            await until(lambda: len(fleet.asked) == 2)
            fleet.open()
            await flush(a, ME)
            await flush(b, ME)
            written = [counted(n, 'tier_writes_total{outcome="hit"') for n in (a, b)]
            assert sum(written) == 5
            assert len(fleet.names) == 5

        of_fleet(test)

    def test_what_an_engine_computed_is_kept_here_though_the_fleet_has_it(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(2)
            store(a, ME, keys)
            await flush(a, ME)
            assert len((await ask(b, keys)).tiers) == 2
            await until(lambda: b.backings[0].find(keys[0], 0, [ORDER]) is not None)
            await clear(b, ME, tiers=["host"])
            assert store(b, ME, keys) == 2

        of_fleet(test)


class TestClear:
    def test_after_it_nothing_older_is_served_by_anybody(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            assert await get(b, keys) == [SHARED] * 3
            await clear(b, ME, tiers=["host"])
            assert len((await ask(b, keys)).tiers) == 3, "b has hints"
            await clear(b, ME, tiers=["host"])
            begun = time.monotonic()
            await clear(a, ME, tiers=["fleet"])
            assert time.monotonic() - begun >= fleet.current.lasts_s
            assert (await ask(b, keys)).lease == 0
            assert (await ask(a, chunk_keys(3, 5))).lease == 0
            await until(lambda: not fleet.names)
            store(b, ME, keys)
            await flush(b, ME)
            await clear(a, ME, tiers=["host"])
            assert await get(a, keys) == [SHARED] * 3

        of_fleet(test)

    def test_who_cannot_hear_of_it_stops_using_the_store(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.shut("epoch")
            await until(lambda: not b.backings[0].readable)
            assert (await ask(b, keys)).lease == 0
            assert b.backings[0].state == "waiting for the store to answer"
            fleet.open()
            await until(lambda: b.backings[0].readable)
            assert await get(b, keys) == [SHARED] * 3

        of_fleet(test)

    def test_a_read_that_ends_behind_a_clear_brings_nothing(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(2)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.shut("read")
            matched = await ask(b, keys)
            assert len(matched.tiers) == 2
            await clear(a, ME, tiers=["fleet"])
            fleet.open()
            assert (await arrive(b, ME, matched.lease)).failed
            release(b, ME, matched.lease)

        of_fleet(test)

    def test_a_write_that_ends_behind_a_clear_is_not_found(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(2)
            fleet.shut("write")
            store(a, ME, keys)
            await until(lambda: len(fleet.asked) == 1)
            clearing = asyncio.ensure_future(clear(b, ME, tiers=["fleet"]))
            await asyncio.sleep(0.05)
            fleet.open()
            await clearing
            await flush(a, ME)
            assert (await ask(b, keys)).lease == 0

        of_fleet(test)

    def test_a_store_that_cannot_be_told_is_not_used_until_it_was(self) -> None:
        async def test(fleet: Fleet, a: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.dead = True
            with pytest.raises(TierUnavailable, match="others may until the store can be told"):
                await clear(a, ME)
            fleet.dead = False
            before = fleet.current
            await until(lambda: a.backings[0].readable)
            assert fleet.current != before, "it was told before anything else"
            assert (await ask(a, keys)).lease == 0

        of_fleet(test, members=1)

    def test_a_question_under_way_does_not_undo_a_clear_that_fails(self) -> None:
        async def test(fleet: Fleet, a: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.shut("epoch")
            asked = fleet.epochs_asked
            await until(lambda: fleet.epochs_asked > asked)
            clearing = asyncio.ensure_future(clear(a, ME))
            await asyncio.sleep(0.01)
            fleet.dead_after_next_epoch = True
            fleet.open()
            with pytest.raises(TierUnavailable, match="others may until the store can be told"):
                await clearing
            assert not a.backings[0].readable, "it said that it serves nothing of it"
            fleet.dead = fleet.dead_after_next_epoch = False
            before = fleet.current
            await until(lambda: a.backings[0].readable)
            assert fleet.current != before
            assert (await ask(a, keys)).lease == 0

        of_fleet(test, members=1, fleet=Fleet(lasts_s=8.0))

    def test_of_some_chunks(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys, others = chunk_keys(3), chunk_keys(2, 1)
            store(a, ME, keys)
            store(a, ME, others)
            await flush(a, ME)
            assert await clear(a, ME, keys[1:], tiers=["fleet"]) == 2
            assert await get(b, keys) == [SHARED]
            assert await get(b, others) == [SHARED] * 2

        of_fleet(test)

    def test_of_a_chunk_that_is_asked_about_before_it_is_written(self) -> None:
        async def test(fleet: Fleet, a: Node) -> None:
            keys = chunk_keys(2)
            fleet.shut("stat")
            store(a, ME, keys)
            await until(lambda: len(fleet.asked) == 1)
            await clear(a, ME, keys[1:], tiers=["fleet"])
            fleet.open()
            await flush(a, ME)
            (name,) = fleet.names
            assert keys[0] in name

        of_fleet(test, members=1)

    def test_of_all_while_a_chunk_is_asked_about(self) -> None:
        async def test(fleet: Fleet, a: Node) -> None:
            fleet.shut("stat")
            store(a, ME, chunk_keys(1))
            await until(lambda: len(fleet.asked) == 1)
            await clear(a, ME)
            fleet.open()
            await flush(a, ME)
            assert not fleet.names

        of_fleet(test, members=1)

    def test_of_a_chunk_that_is_being_written(self) -> None:
        async def test(fleet: Fleet, a: Node) -> None:
            keys = chunk_keys(1)
            fleet.shut("write")
            store(a, ME, keys)
            await until(lambda: len(fleet.asked) == 1)
            clearing = asyncio.ensure_future(clear(a, ME, keys, tiers=["fleet"]))
            await asyncio.sleep(0.05)
            fleet.open()
            await clearing
            await flush(a, ME)
            await until(lambda: not fleet.names)

        of_fleet(test, members=1)


class TestFailures:
    def test_what_has_gone_is_a_miss(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.shut("read")
            matched = await ask(b, keys)
            fleet.objects.clear()
            fleet.open()
            assert (await arrive(b, ME, matched.lease)).failed
            release(b, ME, matched.lease)
            assert (await ask(b, keys)).lease == 0

        of_fleet(test)

    def test_what_is_corrupt_is_removed_and_can_be_stored_again(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(2)
            store(a, ME, keys)
            await flush(a, ME)
            name = Where(fleet.current.number, NAMESPACE, ORDER).name(keys[0], 0)
            fleet.objects._objects[name].data[5000] ^= 1
            assert await get(b, keys) == []
            assert counted(b, "corrupt_objects_total") == 1
            await until(lambda: name not in fleet.names)
            store(b, ME, keys)
            await flush(b, ME)
            await clear(a, ME, tiers=["host"])
            assert await get(a, keys) == [SHARED] * 2

        of_fleet(test)

    def test_what_was_damaged_on_its_way_stays(self) -> None:
        class Noisy(FleetTier):
            flips = 0

            def read(self, ids: Any, into: Any) -> Any:
                answers = super().read(ids, into)
                if self.flips:
                    self.flips -= 1
                    into[0][5000] ^= 1
                return answers

        async def main() -> None:
            fleet = Fleet(lasts_s=5.0)
            noisy = Noisy(fleet)
            a, b = make_member(FleetTier(fleet)), make_member(noisy)
            await begin(a, b)
            noisy.flips = 1
            keys = chunk_keys(1)
            store(a, ME, keys)
            await flush(a, ME)
            assert await get(b, keys) == []
            await until(lambda: len(b.backings[0]._turns) == 0)
            assert len(fleet.names) == 1
            assert await get(b, keys) == [SHARED]
            for node in (a, b):
                await node.stop(drain_s=1.0)

        asyncio.run(main())

    def test_a_dead_store_is_left_alone_and_tried_by_one_question(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(3)
            store(a, ME, keys)
            await flush(a, ME)
            fleet.dead = True
            assert (await ask(b, keys)).lease == 0
            backing = b.backings[0]
            assert backing.state == "off: the store is dead"
            fleet.asked.clear()
            for _ in range(20):
                assert (await ask(b, keys)).lease == 0
            assert not fleet.asked
            assert store(b, ME, chunk_keys(2, 3)) == 2, "and stores are skipped"
            assert counted(b, 'write_behind_skipped_total{tier="fleet",why="tier"}') == 2
            fleet.shut("epoch")
            fleet.dead = False
            await asyncio.sleep(1.2)
            assert not backing.readable, "half open: only the question is under way"
            fleet.open()
            await until(lambda: backing.readable)
            assert await get(b, keys) == [SHARED] * 3

        of_fleet(test)

    def test_a_fleet_may_start_before_its_store(self) -> None:
        async def test(fleet: Fleet, a: Node) -> None:
            assert (await ask(a, chunk_keys(2))).lease == 0
            store(a, ME, chunk_keys(2))
            fleet.dead = False
            await until(lambda: a.backings[0].readable)

        fleet = Fleet()
        fleet.dead = True
        of_fleet(test, members=1, fleet=fleet)

    def test_a_hung_store_holds_up_nobody_for_long(self) -> None:
        async def test(fleet: Fleet, a: Node) -> None:
            for verb in ("stat", "read", "write", "epoch"):
                fleet.shut(verb)
            for _ in range(5):
                begun = time.monotonic()
                assert (await ask(a, chunk_keys(2))).lease == 0
                assert time.monotonic() - begun < 0.5
            store(a, ME, chunk_keys(2))
            await until(lambda: not a.backings[0].readable)
            await until(lambda: "ended for" in a.backings[0].state, 5.0)

        of_fleet(test, members=1, deadline_s=0.5, lookup_timeout_s=0.05)


class TestHints:
    def test_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hints, "MAX_HINTS", 10)
        known, where = hints.Hints(lambda: 0.0), Where(1, NAMESPACE, ORDER)
        for i, key in enumerate(chunk_keys(30)):
            known.note(key, i % 2, where, SLOT)
            known.note(key, 2, where, SLOT)
            known.check_integrity()
        assert len(known) == 10
        assert known.last(chunk_keys(30)[29], 2) is not None

    def test_grow_old(self) -> None:
        now = 0.0
        known, where = hints.Hints(lambda: now), Where(1, NAMESPACE, ORDER)
        (key,) = chunk_keys(1)
        known.note(key, 0, where, SLOT)
        assert known.fresh(key, 0, None)
        assert known.fresh(key, 0, [OTHER]) is None
        now = hints.LIFE_S
        assert known.fresh(key, 0, None) is None
        assert known.last(key, 0)

    def test_what_is_of_no_use_is_not_found_again_so_soon(self) -> None:
        now = 0.0
        known, where = hints.Hints(lambda: now), Where(1, NAMESPACE, ORDER)
        (key,) = chunk_keys(1)
        known.note(key, 0, where, SLOT)
        known.refuse(key, 0, where)
        known.note(key, 0, where, SLOT)
        assert known.fresh(key, 0, None) is None
        known.note(key, 0, where._replace(order=OTHER), SLOT)
        assert known.fresh(key, 0, None)
        now = hints.REFUSAL_S
        known.note(key, 0, where, SLOT)
        assert known.fresh(key, 0, [ORDER])


def test_a_tier_in_service_says_so() -> None:
    async def test(fleet: Fleet, a: Node) -> None:
        state = a.status(ME, p.Status(1)).state
        (tier,) = state["tiers"]
        assert tier["shared"] is True
        assert tier["state"] == "ok"
        assert tier["epoch"] == f"{fleet.current.number:016x}"
        assert isinstance(a.backings[0], SharedBacking)
        assert reserve(a, ME, chunk_keys(1))[0]

    of_fleet(test, members=1)


def test_a_move_takes_nothing_away_that_the_store_does_not_take() -> None:
    async def test(fleet: Fleet, node: Node) -> None:
        keys = chunk_keys(3)
        memory, shared = node.backings
        shared.tier.limits = replace(shared.tier.limits, batch_bytes=SLOT // 2)
        store(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        message = o.Move(1, b"".join(keys), "memory", "fleet", [0], [ORDER], NAMESPACE)
        started = at_once(node.handle(ME, message))
        assert isinstance(started, o.Started)
        job = node.operations.jobs.get(started.job)
        assert job is not None
        await until(lambda: not job.running)
        assert not fleet.names
        assert [memory.find(key, 0, None) is not None for key in keys] == [True] * 3
        assert job.told().done == 0 or job.told().troubles

    of_fleet(test, members=1, owned=MemoryTier())
