"""What a prompt parts from inside it, where a chunk has objects of several groups and ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.groups import answered
from tests.support.nodes import (
    ORDER,
    GatedTier,
    arrive,
    at_once,
    clear,
    flush,
    on_node,
    owned,
    payload,
    stored_payload,
    until,
)

from kvstrata.errors import UsageError
from kvstrata.keys import KeyChain, Namespace, owner_digest
from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

SECRET, CHUNK = bytes(32), 64
FULL, WINDOW = 0, 1 << 16
BLOCKS = {FULL: 16, WINDOW: 32}
"""Tokens of a block of each group: they need not be the same."""
PARTS = (FULL, FULL | 1, WINDOW, WINDOW | 1)
"""Two groups on two ranks."""
NEEDS = (0, 0, 2, 2)
BLOCK_BYTES = {FULL: 1250, WINDOW: 2500}


def group_of(part: int) -> int:
    return part >> 16 << 16


def nbytes_of(part: int, num_tokens: int) -> int:
    """Of a payload."""
    group = group_of(part)
    return -(-num_tokens // BLOCKS[group]) * BLOCK_BYTES[group]


class Engine:
    """What an engine of several groups does with a node, of prompts that it has the tokens of."""

    def __init__(self, node: Node) -> None:
        self.node, self.client = node, Client("pid 1")
        self.namespace = Namespace("m", "l", CHUNK).digest()
        self.chain = KeyChain(SECRET, self.namespace, CHUNK)
        self.owner = owner_digest(SECRET, "", "")

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Of the whole chunks, and of the tail."""
        keys = self.chain.keys(tokens)
        start = len(keys) * CHUNK
        if start < len(tokens):
            keys.append(self.chain.tail(tokens[start:], (), start, keys[-1] if keys else None))
        return keys

    def store(self, tokens: Sequence[int], parts: Collection[int] = PARTS) -> int:
        """Whole chunks, then the tail, part by part; how many objects were published."""
        whole = len(tokens) // CHUNK * CHUNK
        stored = sum(self._store(tokens[:whole], 0, part) for part in parts) if whole else 0
        if whole < len(tokens):
            stored += sum(self._store(tokens, whole // CHUNK, part) for part in parts)
        return stored

    def _store(self, tokens: Sequence[int], first: int, part: int) -> int:
        keys = self.keys(tokens)
        num_tokens = min(CHUNK, len(tokens) - first * CHUNK)
        nbytes = nbytes_of(part, num_tokens)
        windowed = group_of(part) == WINDOW
        template = p.Template(
            "native", ORDER, "bfloat16", [1, nbytes], num_tokens, nbytes, CHUNK, part >> 16,
            "sliding" if windowed else "full", 100 if windowed else 0,
        )  # fmt: skip
        marks = self.chain.marks(
            tokens[first * CHUNK :], [None, *keys][first : len(keys)], (), first * CHUNK
        )
        reserved = at_once(self.node.reserve(self.client, p.Reserve(
            1, self.namespace, b"".join(keys), first, part, template, owner=self.owner,
            marks=b"".join(marks),
        )))  # fmt: skip
        sums = []
        for key, offset in zip(keys[first:], offsets_of(reserved.offsets), strict=True):
            data = payload(key, part, ORDER, nbytes)
            if offset >= 0:
                self.node.host.pool.view(offset + HEADER_BYTES, nbytes)[:] = data
            sums.append(checksum(data))
        commit = p.Commit(1, reserved.reservation, b"".join(sums))
        return at_once(self.node.commit(self.client, commit)).count

    async def match(self, tokens: Sequence[int]) -> p.Matched:
        lengths = [nbytes_of(part, CHUNK) for part in PARTS]
        return await answered(self.node.match(self.client, p.Match(
            1, b"".join(self.chain.keys(tokens)), [*PARTS], [ORDER], lengths, self.owner,
            needs=[*NEEDS],
        )))  # fmt: skip

    def inside(
        self, tokens: Sequence[int], lease: int = 0, chunks: int = 0, **more: Any
    ) -> p.Nearest:
        """What begins as these tokens go on behind so many whole chunks."""
        parent = self.chain.keys(tokens)[chunks - 1] if chunks else None
        (marks,) = self.chain.marks(tokens[chunks * CHUNK :][:CHUNK], [parent], (), chunks * CHUNK)
        nearest = self.node.handle(self.client, p.Inside(
            1, lease, marks, [*PARTS], [ORDER], [BLOCK_BYTES[group_of(part)] for part in PARTS],
            [BLOCKS[group_of(part)] for part in PARTS], self.owner, needs=[*NEEDS], **more,
        ))  # fmt: skip
        assert isinstance(nearest, p.Nearest)
        return nearest

    async def ask(self, tokens: Sequence[int]) -> tuple[p.Matched, p.Nearest]:
        """A match, and what there is inside behind it."""
        matched = await self.match(tokens)
        found = len(matched.tiers)
        if len(tokens) - found * CHUNK < 16:
            return matched, p.Nearest(1, 0, 0)
        return matched, self.inside(tokens, matched.lease, found)

    def drop(self, key: bytes, part: int) -> None:
        self.node.host.drop_object(key, part, Cause.EVICTED)

    def release(self, lease: int, keep: int = 0) -> None:
        self.node.release(self.client, p.Release(lease, keep))

    def check(self, nearest: p.Nearest, offsets: Sequence[int]) -> None:
        """What was answered is all parts of one object, each as it was stored."""
        for part, offset in zip(PARTS, offsets, strict=True):
            nbytes = nbytes_of(part, nearest.num_tokens)
            data = payload(nearest.key, part, ORDER, nbytes)
            assert stored_payload(self.node, offset, nbytes) == data


FIRST = list(range(100, 100 + 4 * CHUNK))


def parting(at: int) -> list[int]:
    """A prompt that has so many tokens of the first one's, and others then."""
    return [*FIRST[:at], *range(5000, 5000 + 5 * CHUNK - at)]


@pytest.mark.parametrize("at", [15, 16, 63, 64, 80, 3 * CHUNK + 15, 3 * CHUNK + 33, 4 * CHUNK - 1])
def test_all_parts_of_it_are_leased(at: int) -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        assert engine.store(FIRST) == 4 * len(PARTS)
        matched, nearest = await engine.ask(parting(at))
        whole = at // CHUNK
        assert len(matched.tiers) == whole
        assert nearest.good_tokens == at % CHUNK // 16 * 16
        if not nearest.good_tokens:
            assert nearest == p.Nearest(1, 0, whole)
            return
        engine.check(nearest, offsets_of(nearest.offsets))
        assert nearest.have == whole
        assert matched.lease in (0, nearest.lease)
        arrived = await arrive(node, engine.client, nearest.lease)
        assert (arrived.ready, arrived.failed) == (whole + 1, False)
        offsets = list(offsets_of(arrived.offsets))
        needless = [number < whole - need if need else False for number in range(whole)
                    for need in NEEDS]  # fmt: skip
        assert [offset == p.NEEDLESS for offset in offsets] == needless + [False] * len(PARTS)
        assert offsets[-len(PARTS) :] == list(offsets_of(nearest.offsets))
        engine.release(nearest.lease)

    on_node(test, slots=40)


@pytest.mark.parametrize("part", PARTS)
def test_half_of_it_is_never_answered(part: int) -> None:
    """Whichever group's or rank's part has gone."""

    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[: CHUNK + 50])
        asked = [*FIRST[: CHUNK + 50], *range(64)]
        chunk, tail = engine.keys(FIRST[: CHUNK + 50])
        engine.drop(tail, part)
        matched, nearest = await engine.ask(asked)
        assert (len(matched.tiers), nearest.lease) == (1, 0)
        engine.release(matched.lease)
        # A shorter one that is there whole is the better one.
        engine.store([*FIRST[: CHUNK + 20], 7, 7])
        matched, nearest = await engine.ask(asked)
        assert nearest.good_tokens == 16
        engine.check(nearest, offsets_of(nearest.offsets))
        engine.release(matched.lease)
        engine.store(FIRST[: CHUNK + 50], [part])
        matched, nearest = await engine.ask(asked)
        assert (nearest.key, nearest.good_tokens) == (tail, 48)
        engine.release(matched.lease)
        engine.drop(chunk, part)
        assert (await engine.match(asked)).lease == 0, "nor is what comes behind half a chunk"

    on_node(test, slots=40)


def test_a_tail_goes_once_all_of_the_one_that_begins_with_it_is_there() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[:40])
        (shorter,) = engine.keys(FIRST[:40])
        (longer,) = engine.keys(FIRST[:60])
        asked = [*FIRST[:60], *range(64)]
        for number, part in enumerate(PARTS):
            nearest = engine.inside(asked)
            assert (nearest.key, nearest.good_tokens) == (shorter, 32), f"{number} parts are there"
            engine.release(nearest.lease)
            engine.store(FIRST[:60], [part])
        assert set(node.host.index.keys()) == {longer}
        nearest = engine.inside(asked)
        assert (nearest.key, nearest.good_tokens) == (longer, 48)
        engine.release(nearest.lease)

    on_node(test, slots=40)


def test_of_a_half_that_never_becomes_whole_the_shorter_tail_stays() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST[:40])
        engine.store(FIRST[:60], PARTS[:-1])
        nearest = engine.inside([*FIRST[:60], *range(64)])
        assert (nearest.num_tokens, nearest.good_tokens) == (40, 32)
        engine.release(nearest.lease)
        # A chunk takes the place of both.
        engine.store(FIRST[:CHUNK])
        assert set(node.host.index.keys()) == set(engine.keys(FIRST[:CHUNK]))

    on_node(test, slots=40)


def test_it_may_be_let_go_of_again() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        matched, nearest = await engine.ask(parting(2 * CHUNK + 40))
        before = engine.client.leased_bytes
        with pytest.raises(UsageError, match="ends whole"):
            engine.release(matched.lease, keep=1)
        engine.release(matched.lease, keep=nearest.have)
        assert engine.client.leased_bytes < before
        arrived = await arrive(node, engine.client, matched.lease)
        assert arrived.ready == 2
        assert len(offsets_of(arrived.offsets)) == 2 * len(PARTS)
        again = engine.inside(parting(2 * CHUNK + 40), matched.lease, 2)
        assert (again.lease, again.have, again.key) == (matched.lease, 2, nearest.key)
        assert [(one.start, one.stop) for one in node.leases[again.lease].shape] == [(0, 2), (2, 3)]
        engine.check(again, offsets_of(again.offsets))
        assert engine.client.leased_bytes == before
        engine.release(matched.lease)

    on_node(test, slots=40)


async def in_the_slower_tier(node: Node, engine: Engine, keys: Sequence[bytes]) -> None:
    """Leave these in the slower tier only."""
    await flush(node, engine.client)
    await clear(node, engine.client, keys, ["host"])


def test_it_is_brought_from_a_slower_tier() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        await in_the_slower_tier(node, engine, engine.keys(FIRST)[1:])
        matched, nearest = await engine.ask(parting(2 * CHUNK + 40))
        assert (nearest.tier, nearest.good_tokens) == (1, 32)
        ready, offsets = 0, list[int]()
        while ready < 3:
            arrived = await arrive(node, engine.client, matched.lease, ready)
            assert not arrived.failed
            ready, offsets = arrived.ready, [*offsets, *offsets_of(arrived.offsets)]
        engine.check(nearest, offsets[-len(PARTS) :])
        engine.release(matched.lease)

    on_node(test, slots=40, tier=MemoryTier())


@pytest.mark.parametrize("cut", [False, True])
def test_without_it_nothing_of_the_lease_is_of_use(cut: bool) -> None:
    """Unless it is let go of."""

    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        await in_the_slower_tier(node, engine, engine.keys(FIRST)[2:])
        tier = owned(node).tier
        assert isinstance(tier, GatedTier)
        tier.shut("read")
        matched, nearest = await engine.ask(parting(2 * CHUNK + 40))
        waiting = asyncio.ensure_future(arrive(node, engine.client, nearest.lease, 2))
        await until(lambda: tier.waiting > 0)
        if cut:
            engine.release(matched.lease, keep=2)
        await clear(node, engine.client, engine.keys(FIRST)[2:])
        tier.open()
        arrived = await waiting
        assert (arrived.ready, arrived.failed) == ((2, False) if cut else (0, True))
        arrived = await arrive(node, engine.client, nearest.lease)
        assert (arrived.ready, arrived.failed) == ((2, False) if cut else (0, True))
        if not cut:
            engine.release(matched.lease, keep=2)
            arrived = await arrive(node, engine.client, nearest.lease)
            assert (arrived.ready, arrived.failed) == (2, False)
        engine.release(matched.lease)

    on_node(test, slots=40, tier=GatedTier())


def test_what_it_needs_is_no_spare() -> None:
    """A window that nobody came to need goes before any chunk; this one is needed."""

    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        engine.release(
            (await engine.match(FIRST)).lease
        )  # has passed over the windows of the first two
        first, second, *_ = engine.keys(FIRST)
        assert (first, WINDOW) in node.host.index.spares
        matched, nearest = await engine.ask(parting(CHUNK + 40))
        assert nearest.key == second
        engine.release(matched.lease)
        for key in (first, second):
            assert (key, WINDOW) not in node.host.index.spares

    on_node(test, slots=40)


def test_leases_of_two_kinds_do_not_mix() -> None:
    async def test(node: Node) -> None:
        engine = Engine(node)
        engine.store(FIRST)
        plain = at_once(node.match(engine.client, p.Match(
            1, engine.chain.keys(FIRST)[0], [FULL], [ORDER], [nbytes_of(FULL, CHUNK)],
        )))  # fmt: skip
        with pytest.raises(UsageError, match="another kind of match"):
            engine.inside(parting(CHUNK + 40), plain.lease, 1)
        matched = await engine.match(FIRST[:CHUNK])
        alone = p.Inside(1, matched.lease, bytes(12), [FULL], [ORDER], [1250], [16])
        with pytest.raises(UsageError, match="another kind of match"):
            node.handle(engine.client, alone)
        for more, words in (
            ({"needs": [0, 1]}, "the needs of 2"),
            ({"needs": [-1]}, "or 0: all"),
            ({"block_tokens": []}, "the blocks of 0"),
            ({"block_tokens": [16, 16]}, "the blocks of 2"),
        ):
            fields: dict[str, Any] = {"block_tokens": [16], **more}
            with pytest.raises(UsageError, match=words):
                node.handle(engine.client, p.Inside(
                    1, 0, bytes(12), [FULL], [ORDER], [1250], **fields,
                ))  # fmt: skip
        engine.release(plain.lease)
        engine.release(matched.lease)

    on_node(test, slots=40)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_history_answers_the_best_that_is_there_whole(data: st.DataObject) -> None:
    """Prompts that part anywhere; parts that come late, or go; against a plain set of them."""
    pieces = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=10)
    prompts = st.builds(
        lambda chosen, cut: [t for one in chosen for t in [one] * 16][cut % 16 :], pieces,
        st.integers(0, 15),
    )  # fmt: skip
    some = st.sets(st.sampled_from(PARTS), min_size=1)

    async def test(node: Node) -> None:
        engine = Engine(node)
        known: dict[bytes, list[int]] = {}  # tokens up to its end, by key

        def has(key: bytes, part: int) -> bool:
            return node.host.get(key, part) is not None

        def whole(key: bytes) -> bool:
            return all(has(key, part) for part in PARTS)

        for _ in range(data.draw(st.integers(2, 16))):
            what = data.draw(st.sampled_from(["store", "store some", "drop", "ask", "ask"]))
            if what.startswith("store"):
                tokens = data.draw(prompts)
                engine.store(tokens, PARTS if what == "store" else data.draw(some))
                for number, key in enumerate(engine.keys(tokens)):
                    known[key] = tokens[: (number + 1) * CHUNK]
                continue
            if what == "drop":
                if known:
                    key = data.draw(st.sampled_from(sorted(known)))
                    engine.drop(key, data.draw(st.sampled_from(PARTS)))
                continue
            tokens = data.draw(prompts)
            keys = engine.chain.keys(tokens)
            matched, nearest = await engine.ask(tokens)
            expected = longest(keys, has)
            assert len(matched.tiers) == expected
            start = expected * CHUNK
            best = 0
            for key, others in known.items():
                theirs, rest = others[start:][:CHUNK], tokens[start:][:CHUNK]
                begins = (len(others) - 1) // CHUNK == expected and others[:start] == tokens[:start]
                if begins and len(theirs) >= 16 and whole(key):
                    same = [one == two for one, two in zip(rest, theirs, strict=False)]
                    agreed = same.index(False) if False in same else len(same)
                    best = max(best, agreed // 16 * 16)
            assert nearest.good_tokens == best
            if best:
                assert whole(nearest.key)
                engine.check(nearest, offsets_of(nearest.offsets))
            if nearest.lease or matched.lease:
                engine.release(nearest.lease or matched.lease)
        node.insides.children.check_integrity()

    on_node(test, slots=300)


def longest(keys: Sequence[bytes], has: Callable[[bytes, int], bool]) -> int:
    """The longest boundary, by the rule and nothing else."""
    return max(
        boundary
        for boundary in range(len(keys) + 1)
        if all(
            has(keys[number], part)
            for part, need in zip(PARTS, NEEDS, strict=True)
            for number in range(max(0, boundary - need) if need else 0, boundary)
        )
    )
