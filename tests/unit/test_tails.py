"""Tails in slower tiers: written like chunks, replaced like tails, found again after a restart."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from tests.support.fleets import Fleet, FleetTier, make_member
from tests.support.insides import BLOCK_BYTES, CHUNK, FIRST, Engine, parting
from tests.support.nodes import (
    GatedTier,
    arrive,
    clear,
    flush,
    on_node,
    owned,
    until,
)

from kvstrata.errors import TierUnavailable
from kvstrata.header import NOBODY
from kvstrata.node.common.index import Index
from kvstrata.node.node import Node
from kvstrata.objects import HEADER_BYTES
from kvstrata.parts import identity
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.tiers.faulty import Answer, FaultyTier, Raise
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p


async def found(engine: Engine, count: int) -> set[int]:
    """Of which prompts of one token only there is something."""
    return {seed for seed in range(count) if (await engine.brought([seed] * 30)).lease}


def tail(engine: Engine, length: int) -> bytes:
    """Key of the tail of so many tokens, behind no chunk."""
    (key,) = engine.keys(FIRST[:length])
    return key


def test_it_outlives_host_memory() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[: CHUNK + 40])
        await flush(node, engine.client)
        # Others take its place there.
        for seed in range(10):
            engine.store([seed] * (2 * CHUNK))
        await flush(node, engine.client)
        assert not any(key in node.host.index for key in engine.keys(FIRST[: CHUNK + 40]))
        nearest = await engine.brought(FIRST, 1)
        assert (nearest.tier, nearest.num_tokens, nearest.good_tokens) == (1, 40, 32)

    on_node(test, slots=6, tier=MemoryTier())


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_it_outlives_the_node(tmp_path: Path, codec: str) -> None:
    async def store(node: Node) -> None:
        engine = Engine(node)
        for seed in range(100):
            engine.store([seed] * 20)
        engine.store(FIRST[: CHUNK + 40])
        await flush(node, engine.client)

    async def ask(node: Node) -> None:
        engine = Engine(node)
        await until(lambda: len(node.insides.children) == 102)
        nearest = await engine.brought(FIRST, 1)
        assert (nearest.tier, nearest.num_tokens, nearest.good_tokens) == (1, 40, 32)
        for seed in range(100):
            nearest = await engine.brought([seed] * 30)
            assert (nearest.num_tokens, nearest.good_tokens) == (20, 16)
        assert (await engine.brought(parting(CHUNK + 20), 1)).good_tokens == 16

    on_node(store, slots=200, tier=DiskTier(tmp_path), tier_slots=300, codec=codec)
    on_node(ask, slots=200, tier=DiskTier(tmp_path), tier_slots=300, codec=codec)


def test_of_more_than_can_be_remembered_those_that_were_used_last(tmp_path: Path) -> None:
    async def store(node: Node) -> None:
        engine = Engine(node)
        for seed in range(80):
            engine.store([seed] * 20)
            await flush(node, engine.client)

    async def ask(node: Node) -> None:
        node.insides.children._most = 50
        engine = Engine(node)
        await until(lambda: node.insides.children.is_full)
        await asyncio.sleep(0.05)
        assert await found(engine, 80) == set(range(30, 80))

    on_node(store, slots=200, tier=DiskTier(tmp_path), tier_slots=300)
    on_node(ask, slots=200, tier=DiskTier(tmp_path), tier_slots=300)


def test_what_was_cleared_by_tenant_is_not_found_after_a_restart(tmp_path: Path) -> None:
    async def store(node: Node) -> None:
        for tenant in "ab":
            engine = Engine(node, tenant)
            engine.store(FIRST[:40])
        await flush(node, engine.client)

    async def mark(node: Node) -> None:
        engine = Engine(node, "a")
        await until(lambda: len(owned(node).index) == 2)
        await node.clear(engine.client, p.Clear(1, None, [], engine.owner))
        assert len(owned(node).index) == 2, "nobody knows yet whose it is"

    async def ask(node: Node) -> None:
        await until(lambda: len(node.insides.children) == 1)
        await asyncio.sleep(0.05)
        assert Engine(node, "a").inside(FIRST).lease == 0
        assert (await Engine(node, "b").brought(FIRST)).good_tokens == 32

    on_node(store, tier=DiskTier(tmp_path))
    silent = FaultyTier(DiskTier(tmp_path))
    silent.inject("headers", Answer())
    on_node(mark, tier=silent)
    on_node(ask, tier=DiskTier(tmp_path))


def test_headers_that_cannot_be_read_hide_no_others(tmp_path: Path) -> None:
    names: dict[int, bytes] = {}

    async def store(node: Node) -> None:
        engine = Engine(node)
        for seed in range(70):
            engine.store([seed] * 20)
            names[seed] = identity(engine.keys([seed] * 20)[0], 0)
            await flush(node, engine.client)

    async def ask(node: Node) -> None:
        # A batch of them fails with the tier; of another batch two do, in two ways.
        await until(lambda: len(node.insides.children) == 70 - 32 - 2)
        assert await found(Engine(node), 70) == set(range(38)) - {10, 20}

    on_node(store, slots=200, tier=DiskTier(tmp_path), tier_slots=300)
    tier = FaultyTier(DiskTier(tmp_path))
    tier.inject("headers", Raise(TierUnavailable("a cable")), times=1)
    tier.inject("headers", Answer(), when=lambda one: one == names[10])
    damage(next(tmp_path.rglob(f"{names[20].hex()}-*.kvo")))
    on_node(ask, slots=200, tier=tier, tier_slots=300)


def damage(file: Path) -> None:
    """Change a bit of the header."""
    data, status = bytearray(file.read_bytes()), file.stat()
    data[1030] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_longer_one_takes_its_place_in_every_tier() -> None:
    async def test(node: Node) -> None:
        engine, index = Engine(node), owned(node).index
        for length in (CHUNK + 20, CHUNK + 35, CHUNK + 50, 2 * CHUNK):
            engine.store(FIRST[:length])
            await flush(node, engine.client)
            expected = {engine.keys(FIRST)[0], engine.keys(FIRST[:length])[-1]}
            await until(lambda expected=expected: set(index.keys()) == expected)  # type: ignore[misc]
            assert set(node.host.index.keys()) == expected
        await until(lambda: not owned(node)._removals.nbytes)
        # One that parts takes no place; a shorter one neither.
        engine.store([*FIRST[: CHUNK + 16], *range(40)])
        engine.store(FIRST[: CHUNK + 32])
        await flush(node, engine.client)
        assert len(index) == 4

    on_node(test, tier=MemoryTier())


def test_one_that_is_not_in_host_memory_any_more_gives_way_too() -> None:
    async def test(node: Node) -> None:
        engine, index = Engine(node), owned(node).index
        engine.store(FIRST[:20])
        await flush(node, engine.client)
        await clear(node, engine.client, tiers=["host"])
        engine.store(FIRST[:40])
        await flush(node, engine.client)
        await until(lambda: set(index.keys()) == {tail(engine, 40)})

    on_node(test, tier=MemoryTier())


def test_what_waits_to_be_written_gives_way_unwritten() -> None:
    async def test(node: Node) -> None:
        engine, backing = Engine(node), owned(node)
        tier = backing.tier
        assert isinstance(tier, GatedTier)
        tier.shut("write")
        for seed in range(backing.num_threads):
            engine.store([seed] * CHUNK)
        await until(lambda: tier.waiting == backing.num_threads)
        engine.store(FIRST[:20])
        engine.store(FIRST[:40])
        assert tail(engine, 20) not in node.host.index
        tier.open()
        await flush(node, engine.client)
        assert tail(engine, 40) in backing.index
        assert tail(engine, 20) not in backing.index
        stored = {found.object_id for batch in tier.scan() for found in batch}
        assert identity(tail(engine, 20), 0) not in stored

    on_node(test, tier=GatedTier())


def test_one_that_is_pinned_stays() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        indexes: list[Index[Any]] = [node.host.index, owned(node).index]
        engine.store(FIRST[:20])
        await flush(node, engine.client)
        for index in indexes:
            assert index.pinned.hold(tail(engine, 20), NOBODY, index.nbytes(tail(engine, 20)))
        engine.store(FIRST[:40])
        await flush(node, engine.client)
        await asyncio.sleep(0.05)
        for index in indexes:
            assert set(index.keys()) == {tail(engine, 20), tail(engine, 40)}
            index.pinned.let_go(tail(engine, 20))
        engine.store(FIRST[:60])
        await flush(node, engine.client)
        for index in indexes:
            await until(lambda i=index: set(i.keys()) == {tail(engine, 60)})  # type: ignore[misc]

    on_node(test, tier=MemoryTier())


def test_one_that_is_on_its_way_to_a_reader_stays() -> None:
    async def test(node: Node) -> None:
        engine, index = Engine(node), owned(node).index
        tier = owned(node).tier
        assert isinstance(tier, GatedTier)
        engine.store(FIRST[:20])
        await flush(node, engine.client)
        await clear(node, engine.client, tiers=["host"])
        tier.shut("read")
        nearest = engine.inside(FIRST)
        assert (nearest.num_tokens, nearest.tier) == (20, 1)
        engine.store(FIRST[:40])
        await flush(node, engine.client)
        await asyncio.sleep(0.05)
        assert set(index.keys()) == {tail(engine, 20), tail(engine, 40)}
        tier.open()
        arrived = await arrive(node, engine.client, nearest.lease)
        assert not arrived.failed
        engine.release(nearest.lease)
        engine.store(FIRST[:60])
        await flush(node, engine.client)
        await until(lambda: set(index.keys()) == {tail(engine, 60)})

    on_node(test, tier=GatedTier())


def test_a_store_that_has_to_be_asked_gets_none() -> None:
    """Nobody could find it there: a fleet's stores are asked for keys."""
    fleet = Fleet()

    async def main() -> None:
        node = make_member(FleetTier(fleet))
        try:
            await node.start()
            await until(lambda: node.backings[0].writable and node.backings[0]._timed)
            engine = Engine(node)
            engine.store(FIRST[: CHUNK + 40])
            await flush(node, engine.client)
            assert [name[-36:-4] for name in fleet.names] == engine.keys(FIRST)[:1]
            assert (await engine.brought(FIRST, 1)).good_tokens == 32
            node.check_integrity()
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())


def test_what_computing_it_takes_is_its_share_of_a_chunk() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[:CHUNK], cost=1.0)
        engine.store(FIRST[:16], cost=1.0)
        for length, cost in ((CHUNK, 1.0), (16, 0.25)):
            assert node.host.index.cost_of(engine.keys(FIRST[:length])[-1]) == cost

    on_node(test, policy="cost")


def test_a_header_that_was_read_with_its_object_counts_more(tmp_path: Path) -> None:
    """Marks out of a header alone prove nothing where objects are authenticated as a whole."""

    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[:40])
        await flush(node, engine.client)
        slot = node.host.get(tail(engine, 40), 0)
        assert slot is not None
        children = node.insides.children
        children.leave(tail(engine, 40))
        wrong = engine.chain.marks([9] * 32, [None])[0]
        children.enter(tail(engine, 40), 40, CHUNK, wrong)
        await clear(node, engine.client, tiers=["host"])
        nearest = engine.inside([9] * 40)
        assert nearest.key == tail(engine, 40)
        await arrive(node, engine.client, nearest.lease)
        engine.release(nearest.lease)
        assert engine.inside([9] * 40).lease == 0
        assert (await engine.brought(FIRST)).good_tokens == 32

    on_node(test, tier=DiskTier(tmp_path))


def test_padding_of_slots_is_zero() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[:40])
        slot = node.host.get(tail(engine, 40), 0)
        assert slot is not None
        used = HEADER_BYTES + 3 * BLOCK_BYTES
        assert not any(node.host.pool.view(slot.offset, slot.nbytes)[used:])

    on_node(test)
