"""A node with kept tokens: one object a context, found by the deepest key, after a restart too."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support.fleets import Fleet, FleetTier, make_member
from tests.support.nodes import arrive, at_once, flush, on_node, owned, until
from tests.support.selected import CHUNK, alike, encoded
from tests.support.working import ask

from kvstrata.codecs import codec_named
from kvstrata.errors import UsageError
from kvstrata.keys import Namespace
from kvstrata.node.coding.choosing import Always
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum, decode
from kvstrata.selection import kept as k
from kvstrata.selection.kept import Kept
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of
from kvstrata.wire.namespaces import Described

SPACE = Namespace("a-model", "a layout", CHUNK, selection="a-method 1 fraction=0.5")
TOLD = Described(SPACE, {}, ["kept"], [0], [1])
KEYS = [random.Random(f"kept {i}").randbytes(32) for i in range(6)]
ROWS = 700


class LastingTier(MemoryTier):
    """Outlives the node that used it, as a folder does."""

    def close(self) -> None:
        pass


def template(kept: Kept, **changes: Any) -> p.Template:
    payload, shape = encoded(kept, ROWS), kept.shape(ROWS)
    made = p.Template(
        "kept", "", kept.dtype, list(shape), CHUNK, len(payload), CHUNK, 0, "recurrent", 0,
        "transformers", k.positions_digest(payload, shape),
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def reserve(node: Node, client: Client, chunks: int, made: p.Template, first: int) -> p.Reserved:
    prefix = b"".join(KEYS[:chunks])
    return at_once(node.reserve(client, p.Reserve(1, SPACE.digest(), prefix, first, 0, made)))


def store(node: Node, kept: Kept) -> None:
    client, payload = Client("pid 1"), encoded(kept, ROWS)
    chunks = kept.prompt_tokens // CHUNK
    reserved = reserve(node, client, chunks, template(kept), chunks - 1)
    (offset,) = offsets_of(reserved.offsets)
    node.host.pool.view(offset + HEADER_BYTES, len(payload))[:] = payload.tobytes()
    done = node.commit(client, p.Commit(1, reserved.reservation, checksum(payload.data)))
    assert at_once(done).count == 1


async def lookup(node: Node) -> int:
    """Chunks before the deepest boundary at which there is something."""
    message = p.Lookup(1, b"".join(KEYS), [0], ["kept"], SPACE.digest())
    answer = node.lookup(Client("pid 1"), message)
    found = answer if isinstance(answer, p.Found) else await answer
    assert isinstance(found, p.Found)
    return max((i for i, tier in enumerate(found.tiers, 1) if tier != p.ABSENT), default=0)


async def load(node: Node, kept: Kept) -> Kept:
    client, key = Client("pid 1"), KEYS[kept.prompt_tokens // CHUNK - 1]
    length = k.payload_bytes(kept.shape(ROWS), kept.dtype)
    message = p.Match(1, key, [0], ["kept"], [length], namespace=SPACE.digest())
    answer = node.match(client, message)
    matched = answer if isinstance(answer, p.Matched) else await answer
    offset = offsets_of(matched.offsets)[0]
    if offset == p.ARRIVING:
        arrived = await arrive(node, client, matched.lease)
        offset = offsets_of(arrived.offsets)[0]
    header = decode(node.host.pool.view(offset, HEADER_BYTES))
    payload = node.host.pool.array(offset + HEADER_BYTES, header.raw_length)
    assert (header.kind, header.boundary) == ("kept", kept.prompt_tokens)
    assert header.positions == k.positions_digest(payload, header.shape)
    again = k.decode(payload.copy(), header.shape, header.dtype, header.boundary)
    node.release(client, p.Release(matched.lease))
    return again


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_the_same_bits_come_back_after_a_restart(codec: str) -> None:
    tier, kept = LastingTier(), alike(1, tokens=4 * CHUNK)

    async def write(node: Node) -> None:
        store(node, kept)
        assert (await load(node, kept)).equals(kept)
        await flush(node, Client("pid 1"))

    async def read(node: Node) -> None:
        await until(lambda: owned(node).state == "ok")
        assert (await load(node, kept)).equals(kept)

    for test in (write, read):
        on_node(test, slots=40, tier=tier, codec=codec)


def test_a_lossy_tier_leaves_counts_and_positions_as_they_were() -> None:
    tier, kept = LastingTier(), alike(2, tokens=3 * CHUNK)

    async def write(node: Node) -> None:
        store(node, kept)
        await flush(node, Client("pid 1"))

    async def read(node: Node) -> None:
        await until(lambda: owned(node).state == "ok")
        again = await load(node, kept)
        assert np.array_equal(again.positions, kept.positions)
        assert not again.equals(kept)

    for test in (write, read):
        on_node(test, slots=40, tier=tier, codec="int8")


def test_it_is_found_by_the_deepest_key_that_is_there() -> None:
    async def test(node: Node) -> None:
        node.record(Client("pid 1"), p.Record(TOLD.record()))
        assert await lookup(node) == 0
        store(node, alike(1, tokens=2 * CHUNK))
        assert await lookup(node) == 2
        store(node, alike(2, tokens=5 * CHUNK))
        assert await lookup(node) == 5

    on_node(test, slots=60)


@pytest.mark.parametrize("round_objects", [1 << 30, 16])
def test_another_node_finds_it_in_a_store_that_both_use(round_objects: int) -> None:
    kept = alike(3, tokens=4 * CHUNK)

    async def main() -> None:
        fleet = Fleet()
        nodes = [
            make_member(
                FleetTier(fleet, round_objects=round_objects), slots=60, lookup_timeout_s=20.0,
                choice=Always(codec_named("lossless")),
            )
            for _ in range(2)
        ]  # fmt: skip
        one, other = nodes
        try:
            for node in nodes:
                await node.start()
                node.record(Client("pid 1"), p.Record(TOLD.record()))
            await until(lambda: all(one.readable for node in nodes for one in node.backings))
            store(one, kept)
            await flush(one, Client("pid 1"))
            assert await lookup(other) == 4
            assert (await load(other, kept)).equals(kept)
            other.check_integrity(contents=True)
        finally:
            for node in nodes:
                await node.stop(drain_s=1.0)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("changes", "first", "says"),
    [
        ({}, 0, "one object, the last of its prompt"),
        ({"group_kind": "full"}, 2, "a kept payload of a full group"),
        ({"positions": b"short"}, 2, "positions has 5 bytes"),
        ({"kind": "portable"}, 2, "a portable payload with positions"),
        ({"kind": "native", "order": "kept", "positions": bytes(16)}, 2, "may be called kept"),
    ],
)
def test_a_writer_of_something_else_is_refused(
    changes: dict[str, Any], first: int, says: str
) -> None:
    async def test(node: Node) -> None:
        with pytest.raises(UsageError, match=says):
            reserve(node, Client("pid 1"), 3, template(alike(), **changes), first)

    on_node(test, slots=40)


def test_an_operator_sees_what_it_is() -> None:
    kept = alike(1, tokens=2 * CHUNK)

    async def test(node: Node) -> None:
        store(node, kept)
        seen: o.Inspected = await ask(node, o.Inspect(1, "host", KEYS[1]))
        assert seen.problem == ""
        assert seen.header["kind"] == "kept"
        assert seen.header["shape"] == kept.shape(ROWS)
        digest = k.positions_digest(encoded(kept, ROWS), kept.shape(ROWS))
        assert seen.header["positions"] == digest.hex()

    on_node(test, slots=40)
