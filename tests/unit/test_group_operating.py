"""An operator's requests about chunks of several layer groups, and other nodes that have them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.groups import (
    FULL,
    STATE,
    WINDOW,
    Needs,
    group_template,
    load_needs,
    needed,
    store_part,
)
from tests.support.members import Member
from tests.support.nodes import (
    ORDER,
    RAW,
    SLOT,
    GatedTier,
    chunk_keys,
    clear,
    flush,
    on_node,
    owned,
    payload,
    until,
)

from kvstrata.keys import Namespace
from kvstrata.node.node import Node
from kvstrata.node.operating import prefetching
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.transfer.tcp import Address
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of
from kvstrata.wire.namespaces import Described
from kvstrata.wire.operator import Operator

NEEDS: Needs = {FULL: 0, WINDOW: 2, STATE: 1}
PARTS = list(NEEDS)
SPACE = Namespace("fingerprint", "layout", 128)
DIGEST = SPACE.digest()
TOLD = Described(SPACE, {}, [ORDER], PARTS, list(NEEDS.values()), [RAW] * 3)
STORED: Mapping[int, Sequence[int]] = {FULL: range(6), WINDOW: range(2, 5), STATE: [1, 4]}
"""Numbers of the chunks that have each part: the longest boundary is behind the fifth."""


def boundary_of(number: int) -> set[tuple[int, int]]:
    """What a boundary needs, by part and number of the chunk."""
    return {
        (part, chunk)
        for part, need in NEEDS.items()
        for chunk in range(number)
        if needed(need, number, chunk)
    }


def there(node: Node, keys: Sequence[bytes]) -> set[tuple[int, int]]:
    return {(part, n) for n, key in enumerate(keys) for part in PARTS if node.host.get(key, part)}


async def fill(node: Node, keys: list[bytes]) -> None:
    """Store, and leave it in the slower tier alone."""
    me = Client("pid 1")
    for part, numbers in STORED.items():
        for number in numbers:
            await store_part(node, me, keys, part, number, number + 1, namespace=DIGEST)
    await flush(node, me)
    await clear(node, me, tiers=["host"])
    node.record(me, p.Record(TOLD.record()))


async def job_of(node: Node, request: o.Prefetch | o.Copy) -> o.JobState:
    started = node.handle(Client("operator"), request)
    assert isinstance(started, o.Started)
    await until(lambda: not node.operations.jobs.running)
    job = node.operations.jobs.get(started.job)
    assert job is not None
    return job.told()


@pytest.mark.parametrize("named", [([], []), (PARTS, []), (PARTS, [ORDER])])
def test_a_prefetch_brings_what_the_longest_boundary_needs(
    named: tuple[list[int], list[str]],
) -> None:
    async def test(node: Node) -> None:
        keys, (parts, orders) = chunk_keys(6), named
        await fill(node, keys)
        job = await job_of(node, o.Prefetch(1, b"".join(keys), parts, orders, [], DIGEST))
        assert (job.state, job.done, job.total, job.troubles) == ("done", 5, 6, [])
        assert "nobody has what more of it needs" in job.note
        assert there(node, keys) == boundary_of(5)

    on_node(test, slots=30, tier=GatedTier())


@pytest.mark.parametrize("parts", [[], PARTS])
def test_a_copy_brings_of_each_chunk_what_is_there(parts: list[int]) -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(7)
        await fill(node, keys)
        copy = o.Copy(1, b"".join(keys), "memory", "host", parts, [ORDER], DIGEST)
        job = await job_of(node, copy)
        assert (job.state, job.done, job.failed) == ("done", 7, 0)
        assert "1" in job.note
        assert there(node, keys) == {(part, n) for part in PARTS for n in STORED[part]}
        moved = await job_of(node, o.Move(2, *_fields(copy)))
        assert moved.failed == 0
        index = node.backings[0].index  # type: ignore[attr-defined]
        assert not any(key in index for key in keys)

    on_node(test, slots=30, tier=GatedTier())


def _fields(copy: o.Copy) -> tuple[Any, ...]:
    return (copy.keys, copy.source, copy.target, copy.parts, copy.orders, copy.namespace)


def test_a_clear_is_of_all_that_a_chunk_has() -> None:
    async def test(node: Node) -> None:
        keys, me = chunk_keys(6), Client("pid 1")
        await fill(node, keys)
        assert await clear(node, me, keys[5:]) == 1
        job = await job_of(node, o.Prefetch(1, b"".join(keys), [], [], [], DIGEST))
        assert job.done == 5
        assert await clear(node, me, keys[4:5], ["memory"]) == 3
        assert await clear(node, me, keys[4:5]) == 3
        job = await job_of(node, o.Prefetch(2, b"".join(keys), [], [], [], DIGEST))
        assert job.done == 0

    on_node(test, slots=30, tier=GatedTier())


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Callable[..., Member]]:
    """Makes nodes of a deployment, and ends them."""
    with ExitStack() as ends:

        def make(peers: Sequence[Address] = (), **options: Any) -> Member:
            member = Member(tmp_path, peers, **options)
            ends.callback(member.close)
            return member

        yield make


def store(member: Member, keys: list[bytes], stored: Mapping[int, Sequence[int]] = STORED) -> None:
    for part, numbers in stored.items():
        for number in numbers:
            call = member.client.reserve(
                DIGEST, keys[: number + 1], number, part, group_template(part)
            )
            reserved = call.wait(5.0)
            (offset,) = offsets_of(reserved.offsets)
            data = payload(keys[number], part)
            member.client.pool.view(offset + HEADER_BYTES, RAW)[:] = data
            member.client.commit(reserved.reservation, [checksum(data)]).wait(5.0)


def load(member: Member, keys: list[bytes]) -> list[int]:
    """Match, wait for all, compare; the tiers of the chunks."""
    matched: p.Matched = member.client.match(
        keys, PARTS, [ORDER], [RAW] * 3, namespace=DIGEST, needs=list(NEEDS.values())
    ).wait(5.0)
    boundary, offsets = len(matched.tiers), list[int]()
    while len(offsets) < 3 * boundary:
        have = len(offsets) // 3
        arrived = member.client.await_arrival(matched.lease, have).wait(20.0)
        assert not arrived.failed
        offsets += offsets_of(arrived.offsets)
    for part, number in boundary_of(boundary):
        offset = offsets[3 * number + PARTS.index(part)]
        found = bytes(member.client.pool.view(offset + HEADER_BYTES, RAW))
        assert found == payload(keys[number], part)
    member.client.release(matched.lease)
    return list(matched.tiers)


def test_a_peer_gives_what_the_boundary_needs(members: Callable[..., Member]) -> None:
    a = members()
    b = members([a.address]).ready()
    keys = chunk_keys(8)
    store(a, keys)
    assert load(b, keys) == [1] * 5
    assert load(b, keys) == [0] * 5


def test_a_prefix_is_sent_with_what_its_boundary_needs(members: Callable[..., Member]) -> None:
    a = members(**{"peer.named": "loopback"})
    b = members(**{"peer.named": "loopback"})
    keys = chunk_keys(6)
    store(a, keys)
    # Only who sends has heard from an engine what the boundaries need.
    a.client.record(TOLD.record())
    operator = Operator(a.client)
    job = operator.send(keys, str(b.address), PARTS, [ORDER], (), DIGEST)
    a.until(lambda: operator.job(job).state != "running")
    told = operator.job(job)
    assert (told.state, told.done, told.troubles) == ("done", 5, [])
    assert load(b, keys) == [0] * 5


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_a_long_prefix_is_sent_in_portions_and_its_end_at_once(
    members: Callable[..., Member], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Before the boundary there are windows and states for none of the portions' ends."""
    monkeypatch.setattr(prefetching, "SEND_CHUNKS", at_once)
    a = members(**{"peer.named": "loopback"})
    b = members(**{"peer.named": "loopback"})
    keys = chunk_keys(9)
    store(a, keys, {FULL: range(8), WINDOW: [5, 6], STATE: [6]})
    a.client.record(TOLD.record())
    operator = Operator(a.client)
    job = operator.send(keys, str(b.address), PARTS, [ORDER], (), DIGEST)
    a.until(lambda: operator.job(job).state != "running")
    told = operator.job(job)
    assert (told.state, told.done, told.troubles) == ("done", 7, [])
    assert told.note == "this node has no more of it"
    fetched = [one.done for one in Operator(b.client).jobs() if one.kind == "fetch"]
    assert fetched[-1] == 2, "what the boundary needs of windows, in one portion"
    assert max(fetched[:-1]) == at_once
    assert load(b, keys) == [0] * 7


@pytest.mark.parametrize("below", [False, True])
def test_a_pinned_prefix_keeps_what_its_end_needs(below: bool) -> None:
    """Though a longer prompt passes over its windows and its state, and others need the room."""

    async def test(node: Node) -> None:
        keys, me, owner = chunk_keys(8), Client("pid 1"), bytes(range(16))
        tiers: list[Any] = [node.host.index, *(owned(node).index for _ in range(below))]
        for index in tiers:
            index.pinned.most_bytes = index.pinned.most_of_owner = 20 * SLOT
        for part in PARTS:
            await store_part(node, me, keys, part, namespace=DIGEST)
        reply = node.handle(me, p.Pin(1, b"".join(keys[:6]), owner, "prefix", 60.0))
        assert isinstance(reply, Awaitable)
        pinned = await reply
        assert isinstance(pinned, p.Pinned)
        assert (pinned.num_chunks, pinned.num_kept) == (6, 6)
        assert await load_needs(node, me, keys, NEEDS) == 8
        for prompt in range(1, 10):
            for part in PARTS:
                await store_part(node, me, chunk_keys(4, prompt), part, namespace=DIGEST)
            await flush(node, me)
        assert await load_needs(node, me, keys, NEEDS) == 6, "no longer one is left"
        if below:
            await clear(node, me, tiers=["host"])
            assert await load_needs(node, me, keys, NEEDS) == 6

    on_node(test, slots=30, tier=GatedTier() if below else None, tier_slots=30)
