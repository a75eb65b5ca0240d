"""What is priced of a model with several groups: what a boundary needs, not the whole prefix."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.groups import (
    FULL,
    STATE,
    WINDOW,
    Needs,
    load_needs,
    longest_of,
    match_needs,
    needed,
    store_part,
)
from tests.support.nodes import SLOT, GatedTier, chunk_keys, clear, flush, on_node, owned

from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.wire import protocol as p

ME = Client("pid 1")
PER_S = 10.0
"""Objects that the slower tier brings in a second."""
MODELS: list[Needs] = [
    {FULL: 0, WINDOW: 2},
    {FULL: 0, STATE: 1},
    {STATE: 1},
    {WINDOW: 2, STATE: 1},
    {FULL: 0, WINDOW: 2, STATE: 1},
]


async def below(node: Node, keys: list[bytes], has: Iterable[tuple[int, int]]) -> None:
    """Store these parts of chunks, and leave them in the slower tier alone."""
    for part, number in sorted(has):
        await store_part(node, ME, keys, part, number, number + 1)
    await flush(node, ME)
    await clear(node, ME, tiers=["host"])


def all_of(needs: Needs, count: int) -> set[tuple[int, int]]:
    return {(part, number) for part in needs for number in range(count)}


def num_needed(needs: Needs, boundary: int, here: Iterable[tuple[int, int]] = ()) -> int:
    """Objects that have to be brought for a boundary."""
    return len({
        (part, number)
        for part, need in needs.items()
        for number in range(boundary)
        if needed(need, boundary, number)
    }.difference(here))  # fmt: skip


async def planned(node: Node, keys: list[bytes], needs: Needs, chunk_s: float) -> p.Matched:
    """What is answered where the tier is as slow as that; the lease is let go of."""
    bandwidth = owned(node).bandwidth
    bandwidth._bytes, bandwidth._seconds = PER_S * SLOT, 1.0
    bandwidth.looked()
    matched = await match_needs(node, ME, keys, needs, chunk_s=chunk_s)
    if matched.lease:
        node.release(ME, p.Release(matched.lease))
    return matched


def test_a_state_is_loaded_where_all_states_would_be_too_slow() -> None:
    """One object for eight chunks."""

    async def test(node: Node) -> None:
        keys, needs = chunk_keys(8), {STATE: 1}
        await below(node, keys, all_of(needs, 8))
        matched = await planned(node, keys, needs, chunk_s=0.02)
        assert (len(matched.tiers), matched.found) == (8, 8)
        assert matched.load_s == pytest.approx(0.1)
        assert matched.compute_s == pytest.approx(0.16)
        await clear(node, ME, tiers=["host"])
        assert (await planned(node, keys, needs, chunk_s=0.01)).tiers == b"", "0.08 s of computing"

    on_node(test, tier=GatedTier(), slots=40)


def test_a_state_that_costs_much_is_not_given_up_for_shorter_ones_that_cost_as_much() -> None:
    """Full attention is here; one state for 12 chunks pays, one for every boundary below, too."""

    async def test(node: Node) -> None:
        keys, needs = chunk_keys(12), {FULL: 0, STATE: 1}
        await below(node, keys, {(FULL, n) for n in range(12)} | {(STATE, 3), (STATE, 11)})
        assert await load_needs(node, ME, keys, {FULL: 0}) == 12
        matched = await planned(node, keys, needs, chunk_s=0.02)
        assert len(matched.tiers) == 12
        assert matched.load_s == pytest.approx(0.1)
        # The whole of what is here is of no use without a state.
        assert matched.compute_s == pytest.approx(0.24)

    on_node(test, tier=GatedTier(), slots=60)


def test_windows_behind_the_boundary_are_not_priced() -> None:
    async def test(node: Node) -> None:
        keys, needs = chunk_keys(10), {FULL: 0, WINDOW: 2}
        await below(node, keys, all_of(needs, 10))
        # 12 objects take 1.2 s, all 20 of them 2 s.
        matched = await planned(node, keys, needs, chunk_s=0.15)
        assert len(matched.tiers) == 10
        assert matched.load_s == pytest.approx(1.2)
        await clear(node, ME, tiers=["host"])
        assert (await planned(node, keys, needs, chunk_s=0.11)).tiers == b""

    on_node(test, tier=GatedTier(), slots=60)


def test_what_is_in_host_memory_is_kept_where_no_more_pays() -> None:
    async def test(node: Node) -> None:
        keys, needs = chunk_keys(9), {FULL: 0, WINDOW: 2, STATE: 1}
        await below(node, keys, all_of(needs, 9))
        assert await load_needs(node, ME, keys[:4], needs) == 4
        matched = await planned(node, keys, needs, chunk_s=0.01)
        assert (len(matched.tiers), matched.found, matched.load_s) == (4, 9, 0.0)
        assert [matched.rest_s, matched.compute_s] == pytest.approx([0.05, 0.05])
        assert node.counters.snapshot()["computed_chunks_total"] == 5

    on_node(test, tier=GatedTier(), slots=60)


@settings(max_examples=60, deadline=None)
@given(
    needs=st.sampled_from(MODELS),
    count=st.integers(1, 9),
    data=st.data(),
    chunk_s=st.sampled_from([0.005, 0.05, 0.11, 0.3, 1.1]),
)
def test_the_boundary_that_takes_least_is_loaded(
    needs: Needs, count: int, data: st.DataObject, chunk_s: float
) -> None:
    """Against all boundaries there are, each reckoned by the rule."""
    names = st.sets(st.sampled_from(sorted(all_of(needs, count))))
    has = all_of(needs, count) - data.draw(names)
    warm = data.draw(st.integers(0, count))

    def seconds(boundary: int, found: int, here: set[tuple[int, int]]) -> float:
        return num_needed(needs, boundary, here) / PER_S + (found - boundary) * chunk_s

    async def test(node: Node) -> None:
        keys = chunk_keys(count)
        await below(node, keys, has)
        await load_needs(node, ME, keys[:warm], needs)
        here = {name for name in has if node.host.get(keys[name[1]], name[0])}
        found = longest_of(has, needs, count)
        can = [n for n in range(found + 1) if not n or longest_of(has, needs, n) == n]
        least = min(seconds(n, found, here) for n in can)
        matched = await planned(node, keys, needs, chunk_s)
        kept = len(matched.tiers)
        assert (kept in can, matched.found) == (True, found)
        assert seconds(kept, found, here) == pytest.approx(least)

    on_node(test, tier=GatedTier(), slots=60)
