"""What computing a chunk takes, on its way from the writer to the policies of all tiers."""

from __future__ import annotations

import pytest
from tests.support import nodes
from tests.support.nodes import (
    SLOT,
    at_once,
    chunk_keys,
    clear,
    flush,
    load,
    make_backing,
    on_node,
    owned,
    write,
)

from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p

ME = Client("pid 1")
CHEAP, DEAR = 0.01, 0.4
A, B, C, D, E = (chunk_keys(1, prompt) for prompt in range(5))


def store(node: Node, keys: list[bytes], cost: float, part: int = 0) -> None:
    number, offsets = nodes.reserve(node, ME, keys, part=part, cost=cost)
    sums = write(node, keys, offsets, part)
    assert at_once(node.commit(ME, p.Commit(1, number, b"".join(sums)))).count == len(keys)


@pytest.mark.parametrize("tier_policy", ["cost", "lru"])
def test_what_was_promoted_does_not_outlive_what_is_dear(tier_policy: str) -> None:
    """Its cost comes from the tier's index, or is what a chunk of its size took last."""

    async def test(node: Node) -> None:
        owned(node).index._policy = make_backing(MemoryTier(), policy=tier_policy).index._policy
        store(node, A, CHEAP)
        store(node, B, DEAR)
        await flush(node, ME)
        if tier_policy == "lru":
            store(node, chunk_keys(1, 9), CHEAP)
            await clear(node, ME, chunk_keys(1, 9))
        await clear(node, ME, A, ["host"])
        assert await load(node, ME, A) == 1
        assert node.host.index.cost_of(A[0]) == CHEAP
        store(node, C, DEAR)
        assert [key in node.host.index for (key,) in (A, B, C)] == [False, True, True]

    on_node(test, slots=2, tier=MemoryTier(), policy="cost")


def test_a_tier_minds_what_its_chunks_cost() -> None:
    async def test(node: Node) -> None:
        store(node, A, DEAR)
        await flush(node, ME)
        store(node, B, CHEAP)
        await flush(node, ME)
        store(node, C, (CHEAP + DEAR) / 2)
        await flush(node, ME)
        index = owned(node).index
        assert [key in index for (key,) in (A, B, C)] == [True, False, True]
        assert index.cost_of(A[0]) == DEAR

    on_node(test, tier=MemoryTier(), tier_slots=2, policy="cost")


def test_what_a_scan_enters_is_neither_cheap_nor_dear() -> None:

    class Lasting(MemoryTier):
        def close(self) -> None:
            pass

    tier = Lasting()

    async def before(node: Node) -> None:
        store(node, A, DEAR)
        await flush(node, ME)

    async def after(node: Node) -> None:
        for keys, cost in ((B, DEAR), (C, CHEAP), (D, DEAR)):
            store(node, keys, cost)
            await flush(node, ME)
        index = owned(node).index
        assert [key in index for (key,) in (A, B, C, D)] == [True, True, False, True]
        store(node, E, DEAR)
        await flush(node, ME)
        assert [key in index for (key,) in (A, B, D, E)] == [False, True, True, True]
        assert index.used_bytes == 3 * SLOT

    on_node(before, tier=tier, policy="cost")
    on_node(after, tier=tier, tier_slots=3, policy="cost")
