"""Nodes that share an object store: a real S3 server under them, and nothing in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.fleets import make_member
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    RAW,
    SLOT,
    arrive,
    chunk_keys,
    clear,
    flush,
    payload,
    release,
    store,
    stored_payload,
    until,
)
from tests.support.object_stores import TIMEOUT_S, let_in

from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.parts import PORTABLE
from kvstrata.testing.servers.seaweedfs import BUCKET, SeaweedFS
from kvstrata.tiers.object_store.client import ObjectClient
from kvstrata.tiers.object_store.paths import USES, name_of
from kvstrata.tiers.object_store.tier import ObjectStoreTier
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

SHARED = 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    server = SeaweedFS(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def place(server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    let_in(monkeypatch)
    monkeypatch.setattr("kvstrata.node.node.UPKEEP_S", 1e6)  # a test says when
    url = f"s3://{BUCKET}/{tmp_path.name}"
    return {"url": url, "endpoint": server.endpoint, "timeout_s": TIMEOUT_S}


async def get(node: Node, keys: Sequence[bytes]) -> list[int]:
    """Match, load and compare; the tier of each chunk that came."""
    me = Client("pid 1")
    answer = node.match(me, p.Match(
        1, b"".join(keys), [0], [ORDER, PORTABLE], [RAW], namespace=NAMESPACE
    ))  # fmt: skip
    matched = await answer if isinstance(answer, Awaitable) else answer
    offsets, ready = list(offsets_of(matched.offsets)), 0
    while ready < len(matched.tiers):
        arrived = await arrive(node, me, matched.lease, ready)
        offsets[ready : arrived.ready] = offsets_of(arrived.offsets)
        ready = arrived.ready
        if arrived.failed:
            break
    for key, offset in zip(keys, offsets[:ready], strict=False):
        assert stored_payload(node, offset) == payload(key), "other bytes came back"
    if matched.lease:
        release(node, me, matched.lease)
    return list(matched.tiers[:ready])


def with_nodes(
    place: dict[str, Any],
    test: Callable[[Node, Node], Coroutine[Any, Any, None]],
    **options: Any,
) -> None:
    """Run a test with two nodes whose only slower tier is the store."""

    async def main() -> None:
        settings = {"capacity_bytes": 1 << 40, "lasts_s": 0.5, **place, **options}
        nodes = [make_member(ObjectStoreTier(**settings), lookup_timeout_s=5.0) for _ in range(2)]
        try:
            for node in nodes:
                await node.start()
            backings = [node.backings[0] for node in nodes]
            # Each has also seen how fast the store is, with an object that would count.
            await until(lambda: all(one.readable and one.place() for one in backings), 30.0)
            await asyncio.wait_for(test(*nodes), 60)
            for node in nodes:
                node.check_integrity()
        finally:
            for node in nodes:
                await node.stop(drain_s=1.0)

    asyncio.run(main())


def test_what_one_node_stored_another_gets(place: dict[str, Any]) -> None:
    async def test(a: Node, b: Node) -> None:
        keys, me = chunk_keys(20), Client("pid 1")
        store(a, me, keys)
        await flush(a, me)
        assert await get(b, keys) == [SHARED] * 20, "more than one round of questions"
        assert await get(b, keys) == [0] * 20
        assert await get(b, chunk_keys(5, prompt=1)) == []

    with_nodes(place, test)


def test_a_clear_is_for_all(place: dict[str, Any]) -> None:
    client = ObjectClient(**place)

    async def test(a: Node, b: Node) -> None:
        keys, me = chunk_keys(4), Client("pid 1")
        store(a, me, keys)
        await flush(a, me)
        await clear(b, me)
        await clear(a, me)
        assert await get(b, keys) == []

        def objects() -> list[str]:
            return [one.path for some in client.listing("") for one in some if name_of(one.path)]

        await until(lambda: not objects())
        store(b, me, keys)
        await flush(b, me)
        await until(lambda: a.backings[0].readable)
        assert await get(a, keys) == [SHARED] * 4

    with_nodes(place, test)


def test_a_nodes_upkeep_keeps_to_the_budget(place: dict[str, Any]) -> None:
    client = ObjectClient(**place)

    async def test(a: Node, b: Node) -> None:
        keys, me = chunk_keys(20), Client("pid 1")
        store(a, me, keys)
        await flush(a, me)
        assert await get(b, keys[:8]) == [SHARED] * 8
        await b.backings[0].upkeep()
        notes = [one.path for some in client.listing(USES) for one in some]
        assert len(notes) == 1, "of what was used"
        await a.backings[0].upkeep()
        assert sum(isinstance(one.tier, ObjectStoreTier) and one.tier.sweeps
                   for node in (a, b) for one in node.backings) == 1  # fmt: skip
        there = [one for some in client.listing("") for one in some if name_of(one.path)]
        assert len(there) == 9

    with_nodes(place, test, capacity_bytes=10 * SLOT, pass_every_s=0.0, note_every_s=0.0)
