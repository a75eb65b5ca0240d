"""Random histories of chunks of several groups, against the rule itself.

What is answered is exactly the longest boundary that the rule allows, whatever was stored, evicted,
cleared and promoted before; and what goes for want of room goes in the order that was promised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.groups import (
    FULL,
    STATE,
    WINDOW,
    Needs,
    in_small_slices,
    load_needs,
    longest_of,
    match_needs,
    needed,
    store_part,
)
from tests.support.nodes import (
    SLOT,
    GatedTier,
    arrive,
    chunk_keys,
    clear,
    flush,
    make_node,
    payload,
    stored_payload,
    until,
)

from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

CHUNKS = 7
SHARED = chunk_keys(3)
PROMPTS = [SHARED + chunk_keys(CHUNKS - 3, prompt) for prompt in (1, 2)]
PARTS = (FULL, WINDOW, STATE)
MODELS: list[Needs] = [
    {FULL: 0, WINDOW: 2},
    {WINDOW: 3, FULL: 0, STATE: 1},
    {FULL: 0, STATE: 1},
    {STATE: 1},
    {WINDOW: 2, STATE: 1},
    {FULL: 0, WINDOW: 0},
]
Name = tuple[bytes, int]

prompts = st.integers(0, 1)
numbers = st.integers(0, CHUNKS - 1)
parts = st.sampled_from(PARTS)
stores = st.tuples(st.just("store"), prompts, parts, numbers, st.integers(1, CHUNKS))
fills = st.tuples(st.just("fill"), prompts, st.sampled_from(MODELS))
matches = st.tuples(st.just("match"), prompts, st.sampled_from(MODELS), st.integers(1, CHUNKS))
OPERATIONS = st.lists(
    st.one_of(
        fills,
        stores,
        stores,
        matches,
        matches,
        matches,
        st.tuples(st.just("begin"), prompts, st.sampled_from(MODELS)),
        st.tuples(st.just("end")),
        st.tuples(st.just("evict"), prompts, numbers, parts),
        st.tuples(st.just("clear"), st.sets(st.tuples(prompts, numbers), max_size=3)),
        st.tuples(st.just("clear host")),
    ),
    min_size=12,
    max_size=40,
)


class SlowTier(GatedTier):
    """A tier that takes its time to read."""

    def read(self, ids: Any, into: Any) -> Any:
        time.sleep(0.0005)
        return super().read(ids, into)


def numbered(keys: list[bytes], names: set[Name]) -> set[tuple[int, int]]:
    """Of these objects those of a prompt, by part and number."""
    place = {key: number for number, key in enumerate(keys)}
    return {(part, place[key]) for key, part in names if key in place}


def run(node: Node, history: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await node.start()
        try:
            await history()
            node.check_integrity(contents=True)
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OPERATIONS)
def test_the_longest_boundary_is_answered_whatever_happened(operations: list[Any]) -> None:
    async def history() -> None:
        me, held = Client("pid 1"), list[tuple[int, Client]]()
        here, there = set[Name](), set[Name]()

        async def stored(keys: list[bytes], part: int, first: int = 0) -> None:
            await store_part(node, me, keys, part, first)
            await flush(node, me)
            new = {(key, part) for key in keys[first:]} - here - there
            here.update(new)
            there.update(new)

        for operation in operations:
            match operation:
                case ("fill", prompt, needs):
                    for part in needs:
                        await stored(PROMPTS[prompt], part)
                case ("store", prompt, part, first, stop) if first < stop:
                    await stored(PROMPTS[prompt][:stop], part, first)
                case ("evict", prompt, number, part):
                    name = PROMPTS[prompt][number], part
                    node.host.drop_object(*name, Cause.EVICTED)
                    here.discard(name)
                case ("clear", places):
                    keys = [PROMPTS[prompt][number] for prompt, number in places]
                    await clear(node, me, keys)
                    here = {name for name in here if name[0] not in keys}
                    there = {name for name in there if name[0] not in keys}
                case ("clear host",):
                    await clear(node, me, tiers=["host"])
                    here.clear()
                case ("begin", prompt, needs):
                    client = Client("pid 2")
                    matched = await match_needs(node, client, PROMPTS[prompt], needs)
                    held.append((matched.lease, client))
                case ("end",):
                    for lease, client in held:
                        node.release(client, p.Release(lease))
                    held.clear()
                case ("match", prompt, needs, count):
                    keys = PROMPTS[prompt][:count]
                    expected = longest_of(numbered(keys, here | there), needs, count)
                    assert await load_needs(node, me, keys, needs) == expected
                    here |= {
                        (keys[number], part)
                        for part, need in needs.items()
                        for number in range(expected)
                        if needed(need, expected, number)
                    }

    node = make_node(slots=200, tier=SlowTier(), deadline_s=600.0)  # none on a busy machine
    run(node, history)


class Evictions:
    """Hears what goes for want of room, and whether it was its turn."""

    def __init__(self, host: HostMemory) -> None:
        self.host = host
        self.spare: dict[Name, None] = {}
        self.needed: set[Name] = set()
        self.there: set[Name] = set()

    def entered(self, tier: str, key: bytes, part: int) -> None:
        self.there.add((key, part))

    def found(self, tier: str, names: Sequence[Name]) -> None:
        self.there.update(names)

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        name = key, part
        # What whoever makes room has found itself stays.
        if cause is Cause.EVICTED and any(key not in self.host._spared for key, _ in self.spare):
            assert name in self.spare, "something else went before what nobody needs"
        self.there.discard(name)
        self.needed.discard(name)
        self.spare.pop(name, None)

    def emptied(self, tier: str) -> None:
        self.there, self.needed, self.spare = set(), set(), {}

    def matched(self, keys: list[bytes], needs: Needs, boundary: int) -> None:
        """A match has ended at a boundary, not at the beginning."""
        for number, key in enumerate(keys[:boundary]):
            for part, need in needs.items():
                name = key, part
                if not need or name not in self.there:
                    continue
                if needed(need, boundary, number):
                    self.needed.add(name)
                    self.spare.pop(name, None)
                elif name not in self.needed:
                    self.spare.setdefault(name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.one_of(fills, stores, matches, matches), min_size=12, max_size=40),
    st.sampled_from(["lru", "cost"]),
)
def test_what_no_match_has_come_to_need_goes_first(operations: list[Any], policy: str) -> None:
    async def history() -> None:
        me = Client("pid 1")
        node.changes.watch(evictions)
        for operation in operations:
            match operation:
                case ("fill", prompt, needs):
                    for part in needs:
                        await store_part(node, me, PROMPTS[prompt], part)
                case ("store", prompt, part, first, stop) if first < stop:
                    await store_part(node, me, PROMPTS[prompt][:stop], part, first)
                case ("match", prompt, needs, count):
                    keys = PROMPTS[prompt][:count]
                    expected = longest_of(numbered(keys, evictions.there), needs, count)
                    assert await load_needs(node, me, keys, needs) == expected
                    if any(needs.values()):
                        evictions.matched(keys, needs, expected)
            names = {name for name in evictions.there if name in node.host.index.spares}
            assert names == set(evictions.spare)

    node = make_node(slots=20, policy=policy)
    evictions = Evictions(node.host)
    run(node, history)


BUSY = st.lists(
    st.one_of(
        fills,
        stores,
        st.tuples(st.just("begin"), prompts, st.sampled_from(MODELS), st.integers(0, 30)),
        st.tuples(st.just("begin"), prompts, st.sampled_from(MODELS), st.integers(0, 30)),
        st.tuples(st.just("load"), st.integers(0, 3)),
        st.tuples(st.just("end"), st.integers(0, 3)),
        st.tuples(st.just("clear"), st.sets(st.tuples(prompts, numbers), max_size=2)),
        st.tuples(st.just("clear host")),
        st.tuples(st.just("turns"), st.integers(1, 20)),
    ),
    min_size=12,
    max_size=40,
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(BUSY, st.integers(3, 16))
def test_nothing_is_lost_and_nothing_wrong_comes_while_all_goes_on_at_once(
    operations: list[Any], cap: int
) -> None:
    """Little room, low caps, small slices; matches, clears and deaths amid each other."""

    async def history() -> None:
        me = Client("writer")
        asked: list[tuple[Client, list[bytes], Needs, asyncio.Future[p.Matched]]] = []
        node.leases.per_client_bytes = cap * SLOT
        node.reservations.per_client_bytes = 24 * SLOT

        async def load(client: Client, keys: list[bytes], needs: Needs, lease: int) -> None:
            ready, offsets = 0, list[int]()
            while (held := node.leases.get(lease)) is not None and ready < held.num_chunks:
                arrived = await asyncio.wait_for(arrive(node, client, lease, ready), 60)
                if arrived.failed:
                    return
                offsets += offsets_of(arrived.offsets)
                ready = arrived.ready
            for place, offset in enumerate(offsets):
                number, part = place // len(needs), list(needs)[place % len(needs)]
                if needed(needs[part], ready, number):
                    assert stored_payload(node, offset) == payload(keys[number], part)
                else:
                    assert offset == p.NEEDLESS

        for operation in operations:
            match operation:
                case ("fill", prompt, needs):
                    for part in needs:
                        await store_part(node, me, PROMPTS[prompt], part)
                case ("store", prompt, part, first, stop) if first < stop:
                    await store_part(node, me, PROMPTS[prompt][:stop], part, first)
                case ("begin", prompt, needs, turns):
                    client, keys = Client("reader"), PROMPTS[prompt]
                    asking: asyncio.Future[p.Matched] = asyncio.ensure_future(
                        match_needs(node, client, keys, needs)
                    )
                    asked.append((client, keys, needs, asking))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                case ("load", number) if number < len(asked):
                    client, keys, needs, asking = asked.pop(number)
                    matched = await asking
                    await load(client, keys, needs, matched.lease)
                    node.end(client)
                case ("end", number) if number < len(asked):
                    node.end(asked.pop(number)[0])
                case ("clear", places):
                    await clear(node, me, [PROMPTS[prompt][number] for prompt, number in places])
                case ("clear host",):
                    await clear(node, me, tiers=["host"])
                case ("turns", turns):
                    for _ in range(turns):
                        await asyncio.sleep(0)
            node.check_integrity()
        for client, keys, needs, asking in asked:
            await load(client, keys, needs, (await asking).lease)
            node.end(client)
        await until(lambda: not list(node.movement.under_way()), timeout_s=60)
        assert node.leases.leased_bytes == 0

    with pytest.MonkeyPatch.context() as patches:
        in_small_slices(patches)
        node = make_node(slots=24, tier=SlowTier(), tier_slots=40, deadline_s=600.0)
        run(node, history)
