"""Clears by tenant in a store that a fleet shares, and of what peers have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.support.attached import secret_in
from tests.support.fleets import Fleet, FleetTier, make_member
from tests.support.nodes import NAMESPACE, GatedTier, chunk_keys, clear, flush, until
from tests.unit.test_owners import ANNA, BERT, answer, client, keep
from tests.unit.test_shared import SHARED, ask, begin, counted, get, of_fleet

from kvstrata.config import load_config
from kvstrata.errors import TierUnavailable
from kvstrata.node.node import Node
from kvstrata.tiers.journal import Journal
from kvstrata.tiers.marks import MARGIN_NS, Whose
from kvstrata.wire import protocol as p

BY_ANNA = p.Clear(1, None, [], ANNA)


def test_after_it_nothing_older_is_served_by_anybody() -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys, others = chunk_keys(3), chunk_keys(3, 1)
        keep(a, keys, ANNA)
        keep(a, others, BERT)
        await flush(a, client())
        assert len((await ask(b, keys)).tiers) == 3, "b has hints, and reads"
        await clear(b, client(), tiers=["host"])
        begun, before = time.monotonic(), fleet.current
        await answer(a, BY_ANNA)
        assert time.monotonic() - begun >= fleet.current.lasts_s
        assert fleet.current.number == before.number, "others keep theirs"
        for node in (a, b):
            assert await get(node, keys) == []
        assert await get(b, others) == [SHARED] * 3

    of_fleet(test)


def test_what_is_stored_after_it_is_for_all() -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys = chunk_keys(3)
        keep(a, keys, ANNA)
        await flush(a, client())
        await answer(a, BY_ANNA)
        assert await get(b, keys) == []
        # What was read has been taken away.
        await until(lambda: not any(keys[0] in name for name in fleet.names))
        for node, some in ((a, keys[:1]), (b, chunk_keys(1, 7))):
            keep(node, some, ANNA)
            await flush(node, client())
        for node in (a, b):
            await clear(node, client(), tiers=["host"])
        assert await get(b, keys[:1]) == [SHARED]
        assert await get(a, chunk_keys(1, 7)) == [SHARED], "both know when that was"

    of_fleet(test)


def test_a_read_that_ends_behind_it_brings_nothing() -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys = chunk_keys(2)
        keep(a, keys, ANNA)
        await flush(a, client())
        fleet.shut("read")
        loading = asyncio.ensure_future(get(b, keys))
        await until(lambda: bool(b.movement.arriving))
        await answer(a, BY_ANNA)
        fleet.open()
        assert await loading == []
        assert counted(b, "cleared_objects_total") > 0

    of_fleet(test)


def test_a_store_that_was_off_serves_nothing_of_it_when_it_is_back() -> None:
    async def test(fleet: Fleet, a: Node) -> None:
        keys, others = chunk_keys(3), chunk_keys(2, 1)
        keep(a, keys, ANNA)
        keep(a, others, BERT)
        await flush(a, client())
        fleet.dead = True
        with pytest.raises(TierUnavailable, match="others may until the store can be told"):
            await answer(a, BY_ANNA)
        fleet.dead = False
        await until(lambda: a.backings[0].readable)
        assert [mark.owner for mark in fleet.current.marks] == [ANNA], "it was told first"
        assert await get(a, keys) == []
        await clear(a, client(), tiers=["host"])
        assert await get(a, others) == [SHARED] * 2

    of_fleet(test, members=1)


def test_a_clear_of_everything_ends_the_marks() -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        await answer(a, BY_ANNA)
        await until(lambda: len(b.backings[0].marks) == 1)
        await clear(b, client())
        assert fleet.current.marks == ()
        await until(lambda: not (len(a.backings[0].marks) or len(b.backings[0].marks)))

    of_fleet(test)


def test_what_is_written_by_a_node_that_had_not_heard_counts_as_before_it() -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys = chunk_keys(1)
        fleet.shut("write")
        keep(b, keys, ANNA)  # is dated now, and lies in b's queue
        await answer(a, BY_ANNA)
        fleet.open()
        await flush(b, client())
        assert await get(a, keys) == []
        await until(lambda: not fleet.names)
        assert fleet.current.marks[0].before_ns + MARGIN_NS > time.time_ns()

    of_fleet(test)


def test_pins_say_that_a_shared_store_keeps_none() -> None:
    async def test(fleet: Fleet, a: Node) -> None:
        keys = chunk_keys(2)
        keep(a, keys, ANNA)
        await flush(a, client())
        pinned = await answer(a, p.Pin(1, b"".join(keys), ANNA, "a", 60.0))
        assert pinned.tiers == {"host": 2}, "no tier that is the node's keeps them"
        assert pinned.notes["fleet"].startswith("not kept")
        assert a.host.index.whose(keys[0]).namespace == NAMESPACE

    of_fleet(test, members=1)


def test_a_node_that_could_not_tell_remembers_over_a_restart() -> None:
    fleet, journal, keys = Fleet(), Journal(), chunk_keys(3)

    async def life(test: Callable[[Node], Coroutine[Any, Any, None]]) -> None:
        node = make_member(FleetTier(fleet), journal=journal)
        try:
            await begin(node)
            await asyncio.wait_for(test(node), 30)
        finally:
            await node.stop(drain_s=1.0)

    async def first(node: Node) -> None:
        keep(node, keys, ANNA)
        keep(node, chunk_keys(2, 1), BERT)
        await flush(node, client())
        fleet.dead = True
        with pytest.raises(TierUnavailable):
            await answer(node, BY_ANNA)

    async def second(node: Node) -> None:
        assert fleet.current.marks == (), "nobody else knows"
        assert await get(node, keys) == []
        assert await get(node, chunk_keys(2, 1)) == [SHARED] * 2
        await answer(node, p.Clear(1))

    async def third(node: Node) -> None:
        assert not len(node.backings[0].marks), "of before that there is nothing"

    asyncio.run(life(first))
    fleet.dead = False
    asyncio.run(life(second))
    asyncio.run(life(third))


def test_an_owned_tier_beside_it() -> None:
    async def test(fleet: Fleet, a: Node) -> None:
        keys = chunk_keys(2)
        keep(a, keys, ANNA)
        await flush(a, client())
        assert len(fleet.names) == 2
        assert (await answer(a, BY_ANNA)).count == 4, "two here, two in the node's own tier"
        assert await get(a, keys) == []

    of_fleet(test, members=1, owned=GatedTier())


def test_what_peers_have_stays_cleared_over_a_clear_of_everything_and_a_restart(
    tmp_path: Path,
) -> None:
    journal = Journal()
    config = load_config(
        environ={},
        overrides={
            "host.capacity": "1MiB",
            "secret_file": str(secret_in(tmp_path)),
            "peer.nodes": "127.0.0.1:1",
        },
    )

    async def clear_twice() -> None:
        node = Node.create(config, journal=journal)
        await node.start()
        await answer(node, BY_ANNA)
        await answer(node, p.Clear(1))
        await node.stop(drain_s=0.0)

    asyncio.run(clear_twice())
    (peers,) = Node.create(config, journal=journal).backings
    assert peers.marks.covers(Whose(ANNA, NAMESPACE), time.time_ns())
