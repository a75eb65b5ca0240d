"""Promotions that nobody waits for: those not begun stop, the others count until they have."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    RAW,
    SLOT,
    GatedTier,
    arrive,
    at_once,
    chunk_keys,
    clear,
    flush,
    load,
    match,
    on_node,
    owned,
    release,
    reserve,
    store,
    template,
    until,
    write,
)

from kvstrata.node.node import Node
from kvstrata.node.service import movement
from kvstrata.node.slots.clients import Client
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

THREADS = 2


async def stored_below(node: Node, client: Client, count: int) -> list[list[bytes]]:
    """Prompts of one chunk each that only the tier has, and whose reads hang."""
    prompts = [chunk_keys(1, prompt) for prompt in range(count)]
    for prompt in prompts:
        store(node, client, prompt)
    await flush(node, client)
    await clear(node, client, tiers=["host"])
    assert node.host.allocated_bytes == 0
    tier = owned(node).tier
    assert isinstance(tier, GatedTier)
    tier.shut("read")
    return prompts


async def ended(node: Node) -> None:
    """Let what hangs come to its end."""
    tier = owned(node).tier
    assert isinstance(tier, GatedTier)
    tier.open()
    await until(lambda: not list(node.movement.under_way()))


@pytest.mark.parametrize("how", ["release", "end"])
@pytest.mark.parametrize("target_s", [0.0, 100.0])
def test_ten_matches_released_at_once_fill_nothing_for_nobody(how: str, target_s: float) -> None:
    async def test(node: Node) -> None:
        me, you = Client("pid 1"), Client("pid 2")
        owned(node).load_target_s = target_s
        prompts = await stored_below(node, me, 10)
        leases = [match(node, you, prompt).lease for prompt in prompts]
        assert node.host.allocated_bytes == you.leased_bytes == 10 * SLOT
        node.check_integrity()
        if how == "end":
            node.end(you)
        else:
            for lease in leases:
                release(node, you, lease)
        # Two reads had begun, and go on to count.
        assert node.host.allocated_bytes == THREADS * SLOT
        assert you.leased_bytes == node.leases.leased_bytes == THREADS * SLOT
        assert node.counters.get("promotions_total", outcome="unwanted") == 8
        node.check_integrity()
        await ended(node)
        assert you.leased_bytes == node.leases.leased_bytes == 0
        assert node.counters.get("promotions_total", outcome="done") == THREADS
        node.check_integrity()
        # What came is there for whoever asks next, and so is all the rest.
        for prompt in prompts:
            assert await load(node, me, prompt) == 1

    on_node(test, slots=10, tier=GatedTier(), num_threads=THREADS)


def test_what_cannot_stop_counts_against_the_caps() -> None:
    """For the client that had it, and in total."""

    async def test(node: Node) -> None:
        me, you = Client("pid 1"), Client("pid 2")
        prompts = await stored_below(node, me, 6)
        for prompt in prompts[:2]:
            release(node, me, match(node, me, prompt).lease)
        assert [node.leases.room_for(client) // SLOT for client in (me, you)] == [1, 2]
        assert [bool(match(node, me, prompt).lease) for prompt in prompts[2:4]] == [True, False]
        assert [bool(match(node, you, prompt).lease) for prompt in prompts[3:5]] == [True, False]
        # What counts already may be had again, and if there is no room left at all.
        assert node.leases.room_for(you) == 0
        assert match(node, you, prompts[0]).lease
        node.check_integrity()
        await ended(node)
        assert (me.leased_bytes, you.leased_bytes) == (2 * SLOT, 1 * SLOT)

    on_node(test, slots=10, tier=GatedTier(), per_client=0.35, total=0.4, num_threads=THREADS)


@pytest.mark.parametrize("target_s", [0.0, 100.0])
def test_what_somebody_else_waits_for_goes_on(target_s: float) -> None:
    async def test(node: Node) -> None:
        me, you = Client("pid 1"), Client("pid 2")
        owned(node).load_target_s = target_s
        keys = chunk_keys(6)
        store(node, me, keys)
        await flush(node, me)
        await clear(node, me, tiers=["host"])
        tier = owned(node).tier
        assert isinstance(tier, GatedTier)
        tier.shut("read")
        first, second = match(node, me, keys).lease, match(node, you, keys[:4]).lease
        release(node, me, first)
        assert node.counters.get("promotions_total", outcome="unwanted") == 2
        assert node.host.allocated_bytes == 4 * SLOT
        node.check_integrity()
        release(node, you, second, keep=3)
        assert node.counters.get("promotions_total", outcome="unwanted") == 3
        tier.open()
        ready = 0
        while ready < 3:
            arrived = await arrive(node, you, second, ready)
            assert not arrived.failed
            ready = arrived.ready
        release(node, you, second)

    on_node(test, tier=GatedTier(), num_threads=THREADS)


def test_the_turn_of_what_is_unwanted_goes_to_others() -> None:
    """A thread that comes back reads for those who still wait."""
    read: list[bytes] = []

    class Noting(GatedTier):
        def read(self, ids: Any, into: Any) -> Any:
            read.extend(name[:32] for name in ids)
            return super().read(ids, into)

    async def test(node: Node) -> None:
        me = Client("pid 1")
        prompts = await stored_below(node, me, 8)
        leases = [match(node, me, prompt).lease for prompt in prompts]
        await until(lambda: len(read) == THREADS)
        for lease in leases[:7]:
            release(node, me, lease)
        await ended(node)
        assert sorted(read) == sorted(key for (key,) in (*prompts[:2], prompts[7]))

    on_node(test, tier=Noting(), num_threads=THREADS)


@pytest.mark.parametrize("how", ["release", "clear"])
@pytest.mark.parametrize("target_s", [0.0, 100.0])
def test_thousands_are_called_off_while_reads_end(
    how: str, target_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gives its turn in a stream to the next one, which nobody wants either."""
    monkeypatch.setattr(movement, "CALL_OFF_SLICE", 1)
    keys = chunk_keys(1500)

    async def test(node: Node) -> None:
        me, backing = Client("pid 1"), node.backings[0]
        tier = backing.tier
        assert isinstance(tier, GatedTier)
        number, offsets = await all_reserved(node, me, keys)
        sums = b"".join(write(node, keys, offsets))
        await answer(node.commit(me, p.Commit(1, number, sums)))
        await flush(node, me)
        await clear(node, me, tiers=["host"])
        backing.load_target_s = target_s
        tier.shut("read")
        matched = await answer(node.match(me, p.Match(1, b"".join(keys), [0], [ORDER], [RAW])))
        assert len(matched.tiers) == 1500
        await until(lambda: tier.waiting == THREADS)
        if how == "clear":
            clearing = asyncio.ensure_future(clear(node, me, tiers=["host"]))
            await asyncio.sleep(0)
        else:
            release(node, me, matched.lease)
        outcome = "unwanted" if how == "release" else "failed"
        assert node.counters.get("promotions_total", outcome=outcome) < 100
        node.check_integrity()
        await ended(node)
        assert node.counters.get("promotions_total", outcome=outcome) >= 1500 - THREADS
        if how == "clear":
            await clearing
            assert node.leases[matched.lease].failed
            release(node, me, matched.lease)
        assert not me.leased_bytes
        assert not node.counters.get("bugs_total", where="a promotion")
        node.check_integrity()

    on_node(test, slots=1500, tier=GatedTier(), tier_slots=2000, num_threads=THREADS,
            queue_slots=1500)  # fmt: skip


async def answer(answer: Any) -> Any:
    """At once or later."""
    return await answer if isinstance(answer, Awaitable) else answer


async def all_reserved(node: Node, client: Client, keys: list[bytes]) -> tuple[int, list[int]]:
    request = p.Reserve(1, NAMESPACE, b"".join(keys), 0, 0, template())
    reserved = await answer(node.reserve(client, request))
    return reserved.reservation, list(offsets_of(reserved.offsets))


def test_a_chunk_without_room_for_all_its_parts_takes_none() -> None:
    async def test(node: Node) -> None:
        me, keys = Client("pid 1"), chunk_keys(2)
        for part in range(2):
            store(node, me, keys, part=part)
        await flush(node, me)
        await clear(node, me, tiers=["host"])
        reserve(node, me, chunk_keys(2, 1))
        assert len(match(node, me, keys, parts=(0, 1)).tiers) == 1
        assert node.counters.get("matches_cut_total", why="room") == 1
        assert node.host.allocated_bytes == 4 * SLOT
        node.check_integrity()
        await ended(node)
        node.end(me)
        assert not list(node.reservations.filling())

    on_node(test, slots=5, tier=GatedTier())


def test_what_is_given_up_before_the_match_is_answered_is_not_there() -> None:
    """A target that cannot be met: the answer has a place for each object, and none of them."""

    async def test(node: Node) -> None:
        me, keys = Client("pid 1"), chunk_keys(4)
        backing = owned(node)
        for part in range(2):
            number, offsets = reserve(node, me, keys, part=part, cost=1e-9)
            at_once(
                node.commit(me, p.Commit(1, number, b"".join(write(node, keys, offsets, part))))
            )
        await flush(node, me)
        await clear(node, me, keys[1:], ["host"])
        backing.load_target_s = 1e-9
        backing.bandwidth._bytes, backing.bandwidth._seconds = 1.0, 1.0  # a byte a second
        matched = match(node, me, keys, parts=(0, 1))
        assert matched.tiers == b"\0\1\1\1"
        there = [offset >= 0 for offset in offsets_of(matched.offsets)]
        assert there == [True] * 2 + [False] * 6
        arrived = await arrive(node, me, matched.lease, 3)
        assert arrived.failed
        assert arrived.ready < 4

    on_node(test, tier=GatedTier())
