"""What a prompt parts from inside it: found as far as tokens agree, leased, brought, replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.insides import (
    BLOCK_BYTES,
    CHUNK,
    FIRST,
    PER_CHUNK,
    Engine,
    parting,
)
from tests.support.nodes import (
    ORDER,
    OTHER,
    GatedTier,
    arrive,
    clear,
    flush,
    make_node,
    on_node,
    owned,
    payload,
    stored_payload,
    until,
)

from kvstrata.errors import UsageError
from kvstrata.header import NOBODY
from kvstrata.node.common.planner import Link
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import decode
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of


def test_marks_come_into_the_header() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[: CHUNK + 40])
        keys = engine.keys(FIRST[: CHUNK + 40])
        expected = engine.chain.marks(FIRST[: CHUNK + 40], [None, keys[0]])
        for key, marks in zip(keys, expected, strict=True):
            slot = node.host.get(key, 0)
            assert slot is not None
            assert decode(node.host.pool.view(slot.offset, slot.nbytes)).marks == marks

    on_node(test)


@pytest.mark.parametrize("at", [0, 15, 16, 17, 63, 64, 79, 80, 81, 95, 96, 127])
def test_as_far_as_tokens_agree(at: int) -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        matched, nearest = engine.ask(parting(at))
        assert len(matched.tiers) == at // CHUNK
        assert nearest.good_tokens == at % CHUNK // 16 * 16
        if not nearest.good_tokens:
            assert (nearest.lease, nearest.key, nearest.offsets) == (0, b"", b"")
            return
        assert nearest.key == engine.keys(FIRST)[at // CHUNK]
        assert (nearest.num_tokens, nearest.tier, nearest.have) == (CHUNK, 0, at // CHUNK)
        (offset,) = offsets_of(nearest.offsets)
        data = payload(nearest.key, nbytes=PER_CHUNK * BLOCK_BYTES)
        assert stored_payload(node, offset, PER_CHUNK * BLOCK_BYTES) == data
        lease = node.leases[nearest.lease]
        assert lease.num_chunks == at // CHUNK + 1
        assert matched.lease in (0, nearest.lease)
        arrived = await arrive(node, engine.client, nearest.lease, at // CHUNK)
        assert (arrived.ready, arrived.failed) == (at // CHUNK + 1, False)
        engine.release(nearest.lease)

    on_node(test)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_never_more_than_agrees(data: st.DataObject) -> None:
    """Prompts that part anywhere from any that were stored, of tenants and salts of their own."""
    piece = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=9)
    prompts = st.builds(
        lambda pieces, cut: [t for one in pieces for t in [one] * 16][cut % 16 :], piece,
        st.integers(0, 15),
    )  # fmt: skip

    async def test(node: Node) -> None:
        engines = [Engine(node), Engine(node, salt="s"), Engine(node, tenant="b")]
        stored: list[list[list[int]]] = [[], [], []]
        for _ in range(data.draw(st.integers(1, 12))):
            who = data.draw(st.integers(0, 2))
            tokens = data.draw(prompts)
            if data.draw(st.booleans()):
                engines[who].store(tokens)
                stored[who].append(tokens)
                continue
            matched, nearest = engines[who].ask(tokens)
            start = len(matched.tiers) * CHUNK
            rest = tokens[start : start + CHUNK]
            best = 0
            for other in stored[who]:
                if other[:start] == tokens[:start]:
                    theirs = other[start : start + CHUNK]
                    if len(theirs) >= 16:
                        same = [one == two for one, two in zip(rest, theirs, strict=False)]
                        agreed = same.index(False) if False in same else len(same)
                        best = max(best, agreed // 16 * 16)
            assert nearest.good_tokens == best
            if nearest.lease or matched.lease:
                engines[who].release(nearest.lease or matched.lease)
        node.insides.children.check_integrity()

    on_node(test, slots=100)


def test_tenants_and_salts_never_meet() -> None:
    async def test(node: Node) -> None:
        mine = Engine(node, "a")
        mine.store(FIRST)
        assert mine.inside(parting(48)).good_tokens == 48
        for other in (Engine(node, "b"), Engine(node, "a", "salt")):
            assert other.inside(parting(48)) == p.Nearest(1, 0, 0)
            assert other.inside(parting(127), chunks=1) == p.Nearest(1, 0, 0)

    on_node(test)


def test_a_newer_longer_one_replaces_the_tail_it_begins_with() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        lengths = [CHUNK + 20, CHUNK + 35, CHUNK + 50, 2 * CHUNK]
        for length in lengths:
            engine.store(FIRST[:length])
            last = engine.keys(FIRST[:length])[-1]
            assert set(node.host.index.keys()) == {engine.keys(FIRST)[0], last}
        # A tail that parts is no beginning; and what is shorter replaces nothing.
        other = [*FIRST[: CHUNK + 16], *range(40)]
        engine.store(other)
        engine.store(FIRST[: CHUNK + 32])
        assert len(node.host.index) == 4

    on_node(test)


def test_a_tail_that_somebody_reads_is_not_replaced() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[:40])
        nearest = engine.inside(FIRST)
        assert (nearest.num_tokens, nearest.good_tokens) == (40, 32)
        engine.store(FIRST[:50])
        assert engine.keys(FIRST[:40])[0] in node.host.index
        engine.release(nearest.lease)
        engine.store(FIRST[:60])
        assert set(node.host.index.keys()) == {engine.keys(FIRST[:60])[0]}

    on_node(test)


def test_a_tail_that_is_pinned_is_not_replaced() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[:40])
        (tail,) = engine.keys(FIRST[:40])
        assert node.host.index.pinned.hold(tail, NOBODY, node.host.index.nbytes(tail))
        engine.store(FIRST[:50])
        assert tail in node.host.index
        node.host.index.pinned.let_go(tail)
        engine.store(FIRST[:60])
        assert set(node.host.index.keys()) == {engine.keys(FIRST[:60])[0]}

    on_node(test)


def test_of_equals_the_one_that_may_be_good_whole() -> None:
    """A tail that ends a few tokens behind the last mark may be good to its end."""

    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[:40])
        engine.store([*FIRST[:38], 7, 7])
        nearest = engine.inside(FIRST)
        assert (nearest.key, nearest.good_tokens) == (engine.keys([*FIRST[:38], 7, 7])[0], 32)
        # One of which a mark says that it is not good to its end comes behind it.
        engine.store([*FIRST[:38], 7, 7, *range(10)])
        another = engine.inside(FIRST)
        assert (another.key, another.good_tokens) == (nearest.key, 32)
        engine.release(nearest.lease)
        engine.release(another.lease)

    on_node(test)


def test_without_marks_nothing_is_found() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST, marked=False)
        engine.store([5] * 15)
        assert engine.inside(parting(48)).lease == 0
        assert len(node.insides.children) == 0

    on_node(test)


def test_in_another_order_nothing_is_found() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST, OTHER)
        assert engine.inside(parting(48)).lease == 0
        assert engine.inside(parting(48), orders=[ORDER, OTHER]).good_tokens == 48

    on_node(test)


def test_what_has_gone_is_found_no_more() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        keys = engine.keys(FIRST)
        await clear(node, engine.client, keys[1:])
        assert engine.inside(parting(127), chunks=1).lease == 0
        assert engine.inside(parting(48)).good_tokens == 48
        assert len(node.insides.children) == 1
        await clear(node, engine.client)
        assert engine.inside(parting(48)).lease == 0
        assert len(node.insides.children) == 0

    on_node(test)


def test_what_its_prompt_waits_for_anyway_is_not_held_against_it() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        await flush(node, engine.client)
        await clear(node, engine.client, engine.keys(FIRST), ["host"])
        queue = Link(bytes_per_s=1e6, queued_bytes=1 << 30)
        with patch.object(type(node.movement), "link", lambda *_: queue):
            alone = engine.inside(parting(100), chunks=1, token_s=1.0)
            matched = engine.match(parting(100))
            behind = engine.inside(parting(100), chunks=1, token_s=1.0, lease=matched.lease)
        assert (alone.lease, behind.lease, behind.good_tokens) == (0, matched.lease, 32)
        engine.release(matched.lease)

    on_node(test, tier=MemoryTier())


def test_it_is_brought_from_a_slower_tier() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        await flush(node, engine.client)
        await clear(node, engine.client, engine.keys(FIRST)[1:], ["host"])
        matched, nearest = engine.ask(parting(100))
        assert (nearest.tier, nearest.good_tokens) == (1, 32)
        assert list(offsets_of(nearest.offsets)) == [p.ARRIVING]
        arrived = await arrive(node, engine.client, nearest.lease, 1)
        (offset,) = offsets_of(arrived.offsets)
        data = payload(nearest.key, nbytes=PER_CHUNK * BLOCK_BYTES)
        assert stored_payload(node, offset, PER_CHUNK * BLOCK_BYTES) == data
        engine.release(matched.lease)
        # How fast the tier is is known now: what would be computed sooner is.
        await clear(node, engine.client, engine.keys(FIRST)[1:], ["host"])
        assert engine.inside(parting(100), chunks=1, token_s=1e-12).lease == 0
        nearest = engine.inside(parting(100), chunks=1, token_s=1e6)
        assert nearest.tier == 1
        engine.release(nearest.lease)

    on_node(test, tier=MemoryTier())


def test_of_equals_the_one_in_the_fastest_tier() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        await flush(node, engine.client)
        await clear(node, engine.client, tiers=["host"])
        engine.store(parting(48))
        # The first one came back last, but it is on its way from below.
        nearest = engine.inside([*FIRST[:48], *range(16)])
        assert (nearest.tier, nearest.key) == (0, engine.keys(parting(48))[0])
        engine.release(nearest.lease)

    on_node(test, tier=MemoryTier())


def test_what_does_not_come_fails_the_lease_there() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        await flush(node, engine.client)
        await clear(node, engine.client, engine.keys(FIRST)[1:], ["host"])
        tier = owned(node).tier
        assert isinstance(tier, GatedTier)
        tier.shut("read")
        matched, nearest = engine.ask(parting(100))
        waiting = asyncio.ensure_future(arrive(node, engine.client, nearest.lease, 1))
        await until(lambda: tier.waiting > 0)
        await clear(node, engine.client, engine.keys(FIRST)[1:])
        tier.open()
        arrived = await waiting
        assert (arrived.ready, arrived.failed) == (1, True)
        engine.release(matched.lease)

    on_node(test, tier=GatedTier())


def test_a_lease_keeps_it_from_being_evicted_and_can_be_cut() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        matched, nearest = engine.ask(parting(100))
        assert nearest.lease == matched.lease
        for seed in range(5):
            engine.store([seed] * (2 * CHUNK))
        assert nearest.key in node.host.index
        engine.release(matched.lease, keep=1)
        assert node.leases[matched.lease].num_chunks == 1
        for seed in range(5):
            engine.store([seed + 100] * (2 * CHUNK))
        assert nearest.key not in node.host.index
        engine.release(matched.lease)

    on_node(test, slots=4)


def test_what_was_used_last_is_evicted_last() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        first, second = [1] * 30, [2] * 30
        engine.store(first)
        engine.store(second)
        assert (await engine.brought(first)).num_tokens == 30
        (used,), (other,) = engine.keys(first), engine.keys(second)
        seed = 2
        while other in node.host.index:
            seed += 1
            engine.store([seed] * 30)
            assert used in node.host.index
        assert seed > 3

    on_node(test, slots=4)


def test_no_more_is_leased_than_may_be() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        engine.store([7] * CHUNK)
        other = [*[7] * 40, *range(CHUNK)]
        matched = engine.match(FIRST)
        assert engine.inside(other).lease == 0
        engine.release(matched.lease)
        assert engine.inside(other).good_tokens == 32

    on_node(test, slots=10, per_client=0.2)


def test_what_makes_no_sense_is_refused() -> None:
    node = make_node()
    engine = Engine(node)
    engine.store(FIRST)
    matched = engine.match(FIRST)
    good = (1, 0, bytes(12), [0], [ORDER], [100], [16])
    wrong: list[tuple[int, Any, str]] = [
        (1, 77, "none of this connection"),
        (2, b"", "bytes of marks"),
        (2, bytes(12 * 257), "bytes of marks"),
        (3, [], "each once"),
        (5, [], "the lengths of 0"),
        (5, [0], "at least one byte"),
        (6, [0], "no numbers of a block's tokens"),
        (6, [], "the blocks of 0"),
        (3, list(range(p.MAX_INSIDE + 1)), "1025 parts inside a chunk"),
    ]
    for place, value, words in wrong:
        fields: list[Any] = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(UsageError, match=words):
            node.handle(engine.client, p.Inside(*fields))
    for more, words in (
        ({"owner": b"x"}, "an owner of 1 bytes"),
        ({"token_s": -1.0}, "no time that a token takes"),
        ({"tiers": ["nowhere"]}, "no tier 'nowhere'"),
    ):
        with pytest.raises(UsageError, match=words):
            node.handle(engine.client, p.Inside(*good, **more))
    with pytest.raises(UsageError, match="none of this connection"):
        node.handle(Client("pid 2"), p.Inside(1, matched.lease, *good[2:]))
    template = p.Template("native", ORDER, "bfloat16", [1, 100], CHUNK, 100, CHUNK)
    request = p.Reserve(1, bytes(32), b"k" * 32, 0, 0, template, marks=bytes(12))
    with pytest.raises(UsageError, match="12 bytes of marks, not 4"):
        node.handle(engine.client, request)
    node.host.close()


def test_of_many_that_are_alike_no_more_are_looked_for_than_need_be() -> None:
    """Of those that lie in host memory the first one is as good as any; behind a tier they wait."""

    async def test(node: Node) -> None:
        engine = Engine(node)
        alike = [[*FIRST[:16], *[number] * (CHUNK - 16)] for number in range(20)]
        for tokens in alike:
            engine.store(tokens)
        await flush(node, engine.client)
        await clear(node, engine.client, engine.keys(alike[-1]), ["host"])
        locate, looked = node.insides._matcher.locate, list[bytes]()

        def counting(key: bytes, *about: Any) -> Any:
            looked.append(key)
            return locate(key, *about)

        with patch.object(node.insides._matcher, "locate", counting):
            nearest = engine.inside(FIRST)
        assert (nearest.tier, nearest.good_tokens) == (0, 16)
        assert looked == [engine.keys(tokens)[0] for tokens in alike[:-3:-1]]
        assert nearest.key == looked[-1]
        engine.release(nearest.lease)

    on_node(test, slots=40, tier=MemoryTier())


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_after_a_restart_what_the_scrub_has_read_is_found(tmp_path: Path, codec: str) -> None:
    async def store(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        await flush(node, engine.client)

    async def ask(node: Node) -> None:
        engine = Engine(node)
        await until(lambda: len(node.insides.children) == 2)
        nearest = engine.inside(parting(100), chunks=1)
        assert (nearest.tier, nearest.good_tokens) == (1, 32)
        arrived = await arrive(node, engine.client, nearest.lease)
        (offset,) = offsets_of(arrived.offsets)
        data = payload(nearest.key, nbytes=PER_CHUNK * BLOCK_BYTES)
        assert stored_payload(node, offset, PER_CHUNK * BLOCK_BYTES) == data
        engine.release(nearest.lease)

    on_node(store, tier=DiskTier(tmp_path), codec=codec)
    on_node(ask, tier=DiskTier(tmp_path), codec=codec, scrub_bytes_per_s=1e9)
