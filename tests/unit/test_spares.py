"""Windows and states that no match has come to need: they go first, in every tier of the node's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.support.groups import FULL, STATE, WINDOW, load_needs, match_needs, store_part
from tests.support.nodes import SLOT, GatedTier, chunk_keys, clear, flush, on_node, owned

from kvstrata.node.common.index import Index
from kvstrata.node.common.spares import Spares
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.wire import protocol as p

ME = Client("pid 1")
WINDOWED = {FULL: 0, WINDOW: 2}
STATEFUL = {FULL: 0, STATE: 1}


@pytest.fixture(autouse=True)
def nothing_of_the_last_test() -> None:
    ME.__init__("pid 1")  # type: ignore[misc]


def numbers(index: Index[Any], keys: Sequence[bytes], part: int) -> list[int]:
    """Of the chunks that have a part."""
    return [number for number, key in enumerate(keys) if index.get(key, part) is not None]


def test_what_was_passed_over_goes_first_and_what_was_needed_stays() -> None:
    spares = Spares()
    for part in range(4):
        spares.pass_over((b"a", part))
    spares.need((b"a", 1))
    spares.pass_over((b"a", 1))
    spares.need((b"a", 9))
    spares.forget((b"a", 2))
    assert [spares.take() for _ in range(3)] == [(b"a", 0), (b"a", 3), None]
    assert spares.names() == {(b"a", 1), (b"a", 9)}
    spares.forget((b"a", 1))
    spares.pass_over((b"a", 1))
    assert (b"a", 1) in spares
    spares.clear()
    assert len(spares) == 0


def test_host_memory_gives_up_windows_that_no_boundary_in_use_needs() -> None:
    async def test(node: Node) -> None:
        keys, others = chunk_keys(6), chunk_keys(3, prompt=1)
        for part in WINDOWED:
            await store_part(node, ME, keys, part)
        assert await load_needs(node, ME, keys[:3], WINDOWED) == 3
        assert await load_needs(node, ME, keys, WINDOWED) == 6
        # Those before the third chunk's end and before the prompt's are needed: 1 and 2, 4 and 5.
        assert await store_part(node, ME, others[:2], FULL) == 2
        assert numbers(node.host.index, keys, WINDOW) == [1, 2, 4, 5]
        assert numbers(node.host.index, keys, FULL) == [*range(6)]
        for count in (3, 6):
            assert await load_needs(node, ME, keys[:count], WINDOWED) == count
        assert await load_needs(node, ME, keys[:5], WINDOWED) == 3
        # With nothing spare a whole chunk goes, the one that was used longest ago.
        assert await store_part(node, ME, others, FULL, first=2) == 1
        assert numbers(node.host.index, keys, FULL) == [*range(5)]
        assert numbers(node.host.index, keys, WINDOW) == [1, 2, 4]

    on_node(test, slots=12)


def test_a_match_makes_no_room_with_what_it_has_found_itself() -> None:
    """Its memory would be another object's, while the match goes on to lease it."""

    async def test(node: Node) -> None:
        keys = chunk_keys(6)
        for part in WINDOWED:
            await store_part(node, ME, keys, part)
        assert await load_needs(node, ME, keys, WINDOWED) == 6
        spare = numbers(node.host.index, keys, WINDOW)
        assert any((key, WINDOW) in node.host.index.spares for key in keys)
        with node.host.sparing(set(keys)):
            assert node.host.allocate(SLOT) is None
        assert numbers(node.host.index, keys, WINDOW) == spare == [*range(6)]

    on_node(test, slots=12)


def test_what_is_leased_or_pinned_is_not_spare() -> None:
    async def test(node: Node) -> None:
        keys, others = chunk_keys(4), chunk_keys(4, prompt=1)
        for part in STATEFUL:
            await store_part(node, ME, keys, part)
        held = await match_needs(node, ME, keys[:2], STATEFUL)
        assert await load_needs(node, ME, keys, STATEFUL) == 4
        # States 0 and 2 are spare, 1 is held, and was needed.
        assert await store_part(node, ME, others[:2], FULL) == 2
        assert numbers(node.host.index, keys, STATE) == [1, 3]
        node.release(ME, p.Release(held.lease))
        assert await load_needs(node, ME, keys[:2], STATEFUL) == 2

    on_node(test, slots=8)


def test_what_is_leased_is_passed_over_and_what_is_pinned_stays() -> None:
    async def test(node: Node) -> None:
        keys, others = chunk_keys(4), chunk_keys(4, prompt=1)
        for part in STATEFUL:
            await store_part(node, ME, keys, part)
        held = await match_needs(node, ME, keys[:1], {FULL: 0, STATE: 0})
        assert await load_needs(node, ME, keys, STATEFUL) == 4
        index = node.host.index
        index.pinned.most_bytes = index.pinned.most_of_owner = index.capacity_bytes
        assert index.pinned.hold(keys[1], bytes(16), index.nbytes(keys[1]))
        # State 0 is held, 1 pinned, 3 needed.
        assert await store_part(node, ME, others[:1], FULL) == 1
        assert numbers(index, keys, STATE) == [0, 1, 3]
        node.release(ME, p.Release(held.lease))
        index.pinned.clear()

    on_node(test, slots=8)


def test_a_slower_tier_gives_up_what_nobody_needed_too() -> None:
    async def test(node: Node) -> None:
        keys, others = chunk_keys(4), chunk_keys(4, prompt=1)
        for part in STATEFUL:
            await store_part(node, ME, keys, part)
        await flush(node, ME)
        assert await load_needs(node, ME, keys, STATEFUL) == 4
        index = owned(node).index
        await store_part(node, ME, others[:2], FULL)
        await flush(node, ME)
        assert numbers(index, keys, FULL) == [*range(4)]
        assert numbers(index, keys, STATE) == [1, 2, 3]
        await store_part(node, ME, others, FULL, first=2)
        await flush(node, ME)
        assert numbers(index, keys, FULL) == [*range(4)]
        assert numbers(index, keys, STATE) == [3]
        await clear(node, ME, tiers=["host"])
        assert await load_needs(node, ME, keys, STATEFUL) == 4

    on_node(test, slots=20, tier=GatedTier(), tier_slots=9)


@pytest.mark.parametrize("first", [FULL, STATE])
def test_a_state_saves_what_is_before_it_and_beside_tokens_nothing_more(first: int) -> None:
    async def test(node: Node) -> None:
        keys, second = chunk_keys(5), STATE if first == FULL else FULL
        await store_part(node, ME, keys, STATE, 3, 4, cost=0.5)
        for part in (first, second):
            await store_part(node, ME, keys, part, 4, cost=0.5)
        await flush(node, ME)
        for index in (node.host.index, owned(node).index):
            assert index.cost_of(keys[3]) == 2.0
            assert index.cost_of(keys[4]) == 0.5

    on_node(test, slots=20, tier=GatedTier(), policy="cost")
