"""The node's part of computing and loading at once: the plan, the order, who waits from the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.nodes import (
    ORDER,
    RAW,
    GatedTier,
    arrive,
    on_node,
    release,
    until,
)
from tests.unit.test_planning import on_disk, speed

from kvstrata.errors import UsageError
from kvstrata.node.common.planner import Link, Meeting, Prefill, meeting, plan
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.tiers.base import Outcome
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

MB = 1 << 20
FLAT = Prefill(chunk_s=0.1)


def meet(tiers: list[int], links: list[Link], prefill: Prefill = FLAT) -> Meeting | None:
    return meeting(tiers, [MB] * len(tiers), links, prefill)


def test_equals_meet_in_the_middle() -> None:
    met = meet([1] * 10, [Link(10 * MB)])
    assert met is not None
    assert met.at == 5
    assert met.seconds == pytest.approx(0.5)


def test_a_faster_link_brings_more() -> None:
    met = meet([1] * 9, [Link(20 * MB)])
    assert met is not None
    assert met.at == 3
    assert met.seconds == pytest.approx(0.3)


def test_the_beginning_is_cheaper_to_compute() -> None:
    met = meet([1] * 10, [Link(10 * MB)], Prefill(0.05, 0.01))
    assert met is not None
    assert met.at > 5


def test_what_is_here_is_not_computed() -> None:
    met = meet([0, 0, 1, 1, 1, 1], [Link(10 * MB)])
    assert met is not None
    assert met.at == 4
    assert met.seconds == pytest.approx(0.2)


def test_nothing_is_met_where_speeds_are_unknown_or_there_is_one_chunk() -> None:
    assert meet([1] * 4, [Link(None)]) is None
    assert meet([1] * 4, [Link(MB)], Prefill()) is None
    assert meet([0, 0, 0, 1], [Link(MB)]) is None
    assert meet([], [Link(MB)]) is None


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.floats(0.01, 1.0),
    st.floats(0.0, 0.1),
    st.floats(0.1, 100.0),
    st.floats(0.1, 100.0),
)
def test_it_is_never_slower_than_loading(
    tiers: list[int], chunk_s: float, pair_s: float, one: float, two: float
) -> None:
    links, prefill = [Link(one * MB), Link(two * MB)], Prefill(chunk_s, pair_s)
    met = meet(tiers, links, prefill)
    if met is None:
        assert sum(map(bool, tiers)) < 2 or tiers.index(max(tiers)) == len(tiers) - 1
        return
    all_s = max(links[tier - 1].seconds(tiers.count(tier) * MB) for tier in set(tiers) - {0})
    here = next(i for i, tier in enumerate(tiers) if tier)
    first = prefill.seconds(here, here + 1)
    assert met.seconds <= max(all_s, first) + 1e-9
    assert plan(tiers, [MB] * len(tiers), links, prefill).load_s <= all_s + 1e-9


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.integers(0, 30),
    st.floats(0.01, 1.0),
    st.floats(0.0, 0.1),
    st.floats(0.1, 100.0),
    st.floats(0.1, 100.0),
)
def test_no_other_place_is_sooner(
    tiers: list[int], first: int, chunk_s: float, pair_s: float, one: float, two: float
) -> None:
    """Every place that they could meet at, one by one; the chunks may be a prompt's later ones."""
    links, prefill = [Link(one * MB), Link(two * MB)], Prefill(chunk_s, pair_s)
    here = next((i for i, tier in enumerate(tiers) if tier), len(tiers))

    def seconds(place: int) -> float:
        loads = [links[n - 1].seconds(tiers[place:].count(n) * MB) for n in (1, 2)]
        return max(*loads, prefill.seconds(first + here, first + place))

    sooner = min(map(seconds, range(here + 1, len(tiers))), default=None)
    met = meeting(tiers, [MB] * len(tiers), links, prefill, first)
    assert (met is None) == (sooner is None)
    if met is not None:
        assert met.seconds == pytest.approx(sooner)
        assert met.seconds == pytest.approx(seconds(met.at))


async def ask(node: Node, client: Client, keys: Sequence[bytes], chunk_s: float) -> p.Matched:
    answer = node.match(
        client, p.Match(1, b"".join(keys), [0], [ORDER], [RAW], chunk_s=chunk_s, meet=True)
    )
    return await answer if isinstance(answer, Awaitable) else answer


async def before(node: Node, client: Client, lease: int, first: int) -> p.Arrived:
    answer = node.await_arrival(client, p.Await(1, lease, first, True))
    arrived = await asyncio.wait_for(answer, 5) if isinstance(answer, Awaitable) else answer
    assert isinstance(arrived, p.Arrived)
    return arrived


def test_the_last_chunk_comes_first() -> None:
    tier = GatedTier()

    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 6)
        speed(node, 20)
        tier.shut("read")
        matched = await ask(node, me, keys, chunk_s=0.05)
        assert (len(matched.tiers), matched.meet) == (6, 3)
        assert matched.load_s == pytest.approx(0.15)
        assert set(offsets_of(matched.offsets)) == {p.ARRIVING}
        assert node.counters.get("plans_total", decision="meet") == 1
        tier.open()
        seen, first = [], 6
        while first:
            arrived = await before(node, me, matched.lease, first)
            slots = offsets_of(arrived.offsets)
            assert len(slots) == first - arrived.ready > 0
            held = node.leases[matched.lease].rows[arrived.ready : first]
            assert list(slots) == [row.slots[0].offset for row in held]
            assert not any(row.num_filling for row in held)
            seen.append(arrived.ready)
            first = arrived.ready
        assert seen == sorted(seen, reverse=True)
        # From the front it is the same lease as ever.
        assert (await arrive(node, me, matched.lease, 5)).ready == 6
        release(node, me, matched.lease)

    on_node(test, tier=tier, slots=20)


def test_reads_go_from_the_end() -> None:
    tier = GatedTier()
    order: list[bytes] = []
    real = tier.read

    def read(ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        order.extend(ids)
        answers: list[int | Outcome] = real(ids, into)
        return answers

    tier.read = read  # type: ignore[method-assign]

    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 8)
        speed(node, 20)
        order.clear()
        matched = await ask(node, me, keys, chunk_s=0.05)
        assert matched.meet == 4
        assert (await arrive(node, me, matched.lease, 7)).ready == 8
        numbers = [next(i for i, key in enumerate(keys) if one.startswith(key)) for one in order]
        # Several threads read at once.
        assert all(abs(number - (7 - i)) <= 4 for i, number in enumerate(numbers)), numbers
        assert numbers[-1] < numbers[0]
        release(node, me, matched.lease)

    on_node(test, tier=tier, slots=20)


@pytest.mark.parametrize("chunks_per_s", [1, 2000])
def test_one_side_alone_where_that_is_sooner(chunks_per_s: int) -> None:
    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 6)
        speed(node, chunks_per_s)
        matched = await ask(node, me, keys, chunk_s=0.05)
        assert matched.meet == 0
        assert len(matched.tiers) == (6 if chunks_per_s > 20 else 0)
        release(node, me, matched.lease)
        await until(lambda: not node.movement.filling())

    on_node(test, tier=GatedTier(), slots=20)


def test_a_chunk_that_does_not_come_ends_it() -> None:
    tier = GatedTier()

    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 6)
        speed(node, 20)
        tier.shut("read")
        matched = await ask(node, me, keys, chunk_s=0.05)
        waiting = asyncio.ensure_future(before(node, me, matched.lease, 3))
        await asyncio.sleep(0)
        node.movement.forget({keys[2]})
        tier.open()
        told = await waiting
        assert (told.ready, told.failed, told.offsets) == (3, True, b"")
        assert (await before(node, me, matched.lease, 6)).ready in range(3, 6)
        release(node, me, matched.lease)
        await until(lambda: not node.movement.filling())

    on_node(test, tier=tier, slots=20)


def test_who_waits_is_told_when_the_lease_ends() -> None:
    tier = GatedTier()

    async def test(node: Node) -> None:
        me = Client("pid 1")
        keys = await on_disk(node, me, 4)
        speed(node, 20)
        tier.shut("read")
        matched = await ask(node, me, keys, chunk_s=0.05)
        waiting = asyncio.ensure_future(before(node, me, matched.lease, 4))
        await asyncio.sleep(0)
        release(node, me, matched.lease, keep=2)
        told = await waiting
        assert (told.ready, told.failed, told.offsets) == (4, True, b"")
        release(node, me, matched.lease)
        with pytest.raises(UsageError, match="no lease"):
            await before(node, me, matched.lease, 4)
        tier.open()
        await until(lambda: not node.movement.filling())

    on_node(test, tier=tier, slots=20)
