"""Boundaries out of tiers that must be asked: in few rounds, and nothing that does not count."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.support.fleets import Fleet, FleetTier, make_member
from tests.support.groups import (
    FULL,
    STATE,
    WINDOW,
    Needs,
    load_needs,
    longest_of,
    match_needs,
    store_part,
)
from tests.support.nodes import GatedTier, chunk_keys, clear, flush, until

from kvstrata.config import load_config
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.observe.reasons import Why
from kvstrata.testing.servers.redis import RedisServer, installed
from kvstrata.wire import protocol as p

ALL_KINDS: Needs = {FULL: 0, WINDOW: 2, STATE: 1}
FOR_ALL, GALLOPING = 1 << 30, 16


def of_fleet(
    test: Callable[..., Coroutine[Any, Any, None]], round_objects: int = FOR_ALL, **options: Any
) -> None:
    """Run a test with two nodes of a fleet."""

    async def main() -> None:
        fleet = Fleet()
        nodes = [
            make_member(
                FleetTier(fleet, round_objects=round_objects),
                **{"slots": 400, "lookup_timeout_s": 20.0, **options},
            )
            for _ in range(2)
        ]
        try:
            for node in nodes:
                await node.start()
            await until(lambda: all(one.readable for node in nodes for one in node.backings))
            await asyncio.wait_for(test(fleet, *nodes), 60)
            for node in nodes:
                node.check_integrity(contents=True)
        finally:
            fleet.open()
            for node in nodes:
                await node.stop(drain_s=1.0)

    asyncio.run(main())


async def put(node: Node, keys: list[bytes], numbers: dict[int, list[int]]) -> None:
    """Store of each part the chunks with these numbers, into the store."""
    me = Client("writer")
    for part, some in numbers.items():
        for number in some:
            await store_part(node, me, keys, part, number, number + 1)
    await flush(node, me)


@pytest.mark.parametrize("round_objects", [FOR_ALL, GALLOPING])
def test_what_another_node_stored_is_found_with_what_its_boundary_needs(round_objects: int) -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys, me = chunk_keys(40), Client("pid 1")
        await put(a, keys, {FULL: [*range(40)], WINDOW: [*range(20, 36)], STATE: [9, 29, 33, 38]})
        fleet.asked.clear()
        matched = await match_needs(b, me, keys, ALL_KINDS)
        assert len(matched.tiers) == 34
        assert matched.tiers == bytes([1] * 34)
        b.release(me, p.Release(matched.lease))
        # The parts of every chunk, and then those of the last ones.
        assert len(fleet.asked) <= (2 if round_objects == FOR_ALL else 6)
        assert await load_needs(b, me, keys, ALL_KINDS) == 34
        brought = sum(b.host.get(key, part) is not None for key in keys for part in ALL_KINDS)
        assert brought == 34 + 2 + 1

    of_fleet(test, round_objects)


@pytest.mark.parametrize("round_objects", [FOR_ALL, GALLOPING])
@pytest.mark.parametrize("needs", [{STATE: 1}, {STATE: 1, WINDOW: 3}])
def test_without_full_attention_it_is_looked_for_from_the_end(
    needs: Needs, round_objects: int
) -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys, me = chunk_keys(30), Client("pid 1")
        await put(a, keys, {STATE: [5, 22], WINDOW: [3, 4, 5, 20, 21, 22]})
        assert await load_needs(b, me, keys, needs) == 23
        assert await load_needs(b, me, keys[:20], needs) == 6

    of_fleet(test, round_objects)


def test_a_store_that_is_asked_for_a_few_is_not_asked_for_ever() -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys, me = chunk_keys(300), Client("pid 1")
        await put(a, keys, {STATE: [5]})
        fleet.asked.clear()
        assert await load_needs(b, me, keys, {STATE: 1}) == 0
        assert len(fleet.asked) == 4
        assert sum(fleet.asked) <= 4 * GALLOPING

    of_fleet(test, GALLOPING)


def test_some_of_it_is_here_and_some_is_there() -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys, me = chunk_keys(12), Client("pid 1")
        await put(a, keys, {FULL: [*range(12)], WINDOW: [*range(12)], STATE: [11]})
        await store_part(b, me, keys, FULL, stop=6)
        await store_part(b, me, keys, WINDOW, 10, 11)
        matched = await match_needs(b, me, keys, ALL_KINDS)
        assert matched.tiers == bytes([0] * 6 + [1] * 6)
        b.release(me, p.Release(matched.lease))
        assert await load_needs(b, me, keys, ALL_KINDS) == 12

    of_fleet(test)


@pytest.mark.parametrize("round_objects", [FOR_ALL, GALLOPING])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_exactly_the_longest(seed: int, round_objects: int) -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        rng, me = random.Random(seed), Client("pid 1")
        for prompt in range(4):
            keys = chunk_keys(10, prompt)
            there = {
                part: [number for number in range(10) if rng.random() < share]
                for part, share in ((FULL, 0.95), (WINDOW, 0.7), (STATE, 0.4))
            }
            if round_objects == GALLOPING:  # which stands on heads being stored first
                there[FULL] = [*range(len(there[FULL]))]
            here = {part: [n for n in some if rng.random() < 0.3] for part, some in there.items()}
            await put(b, keys, here)
            await put(a, keys, there)
            for needs in (ALL_KINDS, {FULL: 0, WINDOW: 2}, {WINDOW: 3, STATE: 1}):
                expected = longest_of(
                    {(part, number) for part in there for number in there[part]}, needs, 10
                )
                assert await load_needs(b, me, keys, needs) == expected

    of_fleet(test, round_objects)


def test_what_is_said_too_late_is_there_for_the_next() -> None:
    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys, me = chunk_keys(4), Client("pid 1")
        await put(a, keys, {FULL: [*range(4)], WINDOW: [*range(4)], STATE: [3]})
        await store_part(b, me, keys, FULL)
        fleet.shut("stat")
        matched = await match_needs(b, me, keys, ALL_KINDS)
        assert (matched.lease, matched.tiers) == (0, b"")
        assert [(one.why, one.chunks, one.tier) for one in matched.why] == [
            (Why.DEADLINE, 4, "fleet")
        ]
        fleet.open()
        backing = b.backings[0]
        await until(lambda: backing.find(keys[3], STATE, None) is not None)
        assert await load_needs(b, me, keys, ALL_KINDS) == 4

    of_fleet(test, lookup_timeout_s=0.05)


@pytest.mark.skipif(not installed(), reason="there is no redis-server here")
def test_through_a_real_redis(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    config = load_config(environ={}, overrides={
        "host.capacity": "16MiB", "redis": {"url": server.url, "lookup_timeout": "10s"},
    })  # fmt: skip

    async def main() -> None:
        a, b = Node.create(config), Node.create(config)
        try:
            for node in (a, b):
                await node.start()
            await until(lambda: all(node.backings[0].readable for node in (a, b)))
            keys, me = chunk_keys(24), Client("pid 1")
            await put(a, keys, {FULL: [*range(24)], WINDOW: [*range(12, 20)], STATE: [7, 17, 22]})
            assert await load_needs(b, me, keys, ALL_KINDS) == 18
            assert await load_needs(b, me, keys, {FULL: 0, STATE: 1}) == 23
            assert await load_needs(b, me, keys, {STATE: 1}) == 23
            for node in (a, b):
                node.check_integrity(contents=True)
        finally:
            for node in (a, b):
                await node.stop(drain_s=1.0)

    try:
        asyncio.run(main())
    finally:
        server.close()


def test_the_gates_of_a_local_tier_hold_nobody_up() -> None:
    """A walk asks indexes only: a tier that hangs while it is matched delays no answer."""

    async def test(fleet: Fleet, a: Node, b: Node) -> None:
        keys, me = chunk_keys(4), Client("pid 1")
        for part in ALL_KINDS:
            await store_part(b, me, keys, part)
        await flush(b, me)
        await clear(b, me, tiers=["host"])
        tier = next(one.tier for one in b.backings if isinstance(one.tier, GatedTier))
        tier.shut("read")
        matched = await match_needs(b, me, keys, ALL_KINDS)
        assert len(matched.tiers) == 4
        tier.open()
        b.release(me, p.Release(matched.lease))

    async def main() -> None:
        fleet = Fleet()
        node = make_member(FleetTier(fleet), owned=GatedTier(), slots=40)
        try:
            await node.start()
            await until(lambda: all(one.readable for one in node.backings))
            await asyncio.wait_for(test(fleet, node, node), 60)
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())
