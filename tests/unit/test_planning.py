"""What a match leaves to the engine, since computing it is sooner: on a node, with slow tiers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    RAW,
    SLOT,
    GatedTier,
    arrive,
    chunk_keys,
    clear,
    flush,
    load,
    on_node,
    owned,
    release,
    store,
    until,
)

from kvstrata.errors import UsageError
from kvstrata.node import matching
from kvstrata.node.common import slices
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.wire import protocol as p


async def ask(
    node: Node,
    client: Client,
    keys: Sequence[bytes],
    chunk_s: float,
    pair_s: float = 0.0,
) -> p.Matched:
    answer = node.match(client, p.Match(
        1, b"".join(keys), [0], [ORDER], [RAW], namespace=NAMESPACE, chunk_s=chunk_s, pair_s=pair_s
    ))  # fmt: skip
    return await answer if isinstance(answer, Awaitable) else answer


def speed(node: Node, chunks_per_s: float) -> None:
    """Let the node believe that the tier brings so much."""
    bandwidth = owned(node).bandwidth
    bandwidth._bytes, bandwidth._seconds = chunks_per_s * SLOT, 1.0
    bandwidth.looked()


async def on_disk(node: Node, client: Client, count: int) -> list[bytes]:
    """Chunks that only the slower tier has."""
    keys = chunk_keys(count)
    store(node, client, keys)
    await flush(node, client)
    await clear(node, client, tiers=["host"])
    return keys


def test_a_slow_tier_brings_nothing_and_is_not_read() -> None:
    tier = GatedTier()

    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 6)
        speed(node, 10)
        tier.shut("read")
        matched = await ask(node, me, keys, chunk_s=0.05)
        assert (matched.lease, matched.tiers, matched.found) == (0, b"", 6)
        assert matched.load_s == 0.0
        assert matched.rest_s == pytest.approx(0.3)
        assert not tier.waiting
        assert node.host.allocated_bytes == 0, "what was set aside for it is free again"
        assert node.counters.snapshot()["computed_chunks_total"] == 6
        tier.open()

    on_node(test, tier=tier, slots=20)


def test_a_fast_one_brings_everything() -> None:
    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 6)
        speed(node, 100)
        matched = await ask(node, me, keys, chunk_s=0.05)
        assert (len(matched.tiers), matched.found) == (6, 6)
        assert matched.load_s == pytest.approx(0.06)
        assert matched.rest_s == 0.0
        assert matched.compute_s == pytest.approx(0.3)
        assert (await arrive(node, me, matched.lease, 5)).ready == 6
        release(node, me, matched.lease)

    on_node(test, tier=GatedTier(), slots=20)


def test_who_leaves_it_to_the_engine_keeps_it_from_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(node: Node) -> None:
        me, other = Client("pid 1"), Client("pid 2")
        keys = await on_disk(node, me, 6)
        monkeypatch.setattr(slices, "HOLD_S", 0.0)
        monkeypatch.setattr(matching, "SLICE_OBJECTS", 1)
        computed = 0
        for turns in range(30):
            await clear(node, me, tiers=["host"])
            speed(node, 10)
            one = asyncio.ensure_future(ask(node, other, keys, chunk_s=0.05))
            for _ in range(turns):
                await asyncio.sleep(0)
            matched = await ask(node, me, keys, chunk_s=0.0)
            assert len(matched.tiers) == 6
            left = await one
            computed += not left.lease
            release(node, other, left.lease)
            ready = 0
            while ready < 6:
                arrived = await asyncio.wait_for(arrive(node, me, matched.lease, ready), 5)
                assert not arrived.failed
                ready = arrived.ready
            release(node, me, matched.lease)
            await until(lambda: not list(node.movement.under_way()))
            node.check_integrity()
        assert computed > 5

    on_node(test, tier=GatedTier(), slots=20)


def test_what_host_memory_has_stays() -> None:
    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 6)
        assert await load(node, me, keys[:2]) == 2
        speed(node, 10)
        matched = await ask(node, me, keys, chunk_s=0.05)
        assert (list(matched.tiers), matched.found) == ([0, 0], 6)
        assert matched.compute_s == pytest.approx(0.2)
        release(node, me, matched.lease)
        node.check_integrity()

    on_node(test, tier=GatedTier(), slots=20)


def test_dear_tails_are_loaded() -> None:
    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 6)
        speed(node, 10)
        assert (await ask(node, me, keys, chunk_s=0.05, pair_s=0.001)).lease == 0
        matched = await ask(node, me, keys, chunk_s=0.05, pair_s=0.05)
        assert len(matched.tiers) == 6
        release(node, me, matched.lease)
        await until(lambda: not node.movement.filling())

    on_node(test, tier=GatedTier(), slots=20)


def test_what_a_tier_has_to_bring_already_counts() -> None:
    tier = GatedTier()

    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 8)
        speed(node, 30)
        tier.shut("read")
        first = await ask(node, me, keys[:4], chunk_s=0.05)
        assert len(first.tiers) == 4
        others = await ask(node, me, keys[4:], chunk_s=0.05)
        assert others.lease == 0, "behind the first four it would take too long"
        tier.open()
        await until(lambda: not node.movement.filling())
        release(node, me, first.lease)
        speed(node, 30)
        others = await ask(node, me, keys[4:], chunk_s=0.05)
        assert len(others.tiers) == 4
        release(node, me, others.lease)
        await until(lambda: not node.movement.filling())

    on_node(test, tier=tier, slots=20)


def test_a_tier_that_was_too_slow_is_looked_at_now_and_then() -> None:
    tier = GatedTier()

    async def test(node: Node) -> None:
        me, bandwidth = Client("pid 1"), owned(node).bandwidth
        keys = await on_disk(node, me, 4)
        speed(node, 1)
        assert (await ask(node, me, keys, chunk_s=0.05)).lease == 0
        await asyncio.sleep(0.02)
        assert bandwidth.bytes_per_s == pytest.approx(SLOT), "not so soon"
        bandwidth._brought_at -= 11.0
        assert (await ask(node, me, keys, chunk_s=0.05)).lease == 0
        await until(lambda: (bandwidth.bytes_per_s or 0) > 2 * SLOT)

    on_node(test, tier=tier, slots=20)


def test_unknown_speeds_are_held_against_nobody() -> None:
    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 4)
        speed(node, 1)
        matched = await ask(node, me, keys, chunk_s=0.0)
        assert len(matched.tiers) == 4
        release(node, me, matched.lease)
        await until(lambda: not node.movement.filling())

    on_node(test, tier=GatedTier(), slots=20)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_times_that_are_none(wrong: float) -> None:
    async def test(node: Node) -> None:
        for times in ({"chunk_s": wrong}, {"chunk_s": 0.1, "pair_s": wrong}):
            with pytest.raises(UsageError, match="no times of a chunk"):
                await ask(node, Client("pid 1"), chunk_keys(1), **times)

    on_node(test)


def test_off_means_off() -> None:
    from tests.support.real_nodes import on_real_node

    async def test(node: Any) -> None:
        assert node._matcher.planning is False

    on_real_node(test, {"planner": "off"})
