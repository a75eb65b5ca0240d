"""Nodes made from a configuration, with real KV in vLLM's own byte order going through them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import numpy as np
from tests.support.nodes import NAMESPACE, arrive, at_once, chunk_keys, until

from kvstrata.codecs.base import Payload
from kvstrata.config import load_config
from kvstrata.header import object_id
from kvstrata.layout import LayerGroup, native_order
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum, decode
from kvstrata.testing.codecs import kv_like
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

VEC = "vllm/cpu-vec/b32/bfloat16"
GROUP = LayerGroup(0, "full", 2, 3, 64, 2, "bfloat16")
SHAPE = Payload((2, 2, 3, 128, 64), "bfloat16", 0)
NBYTES = SHAPE.nbytes
TEMPLATE = p.Template("native", VEC, "bfloat16", [2, 4, 2, 3, 32, 64], 128, NBYTES)
KEYS = chunk_keys(3)
ME = Client("pid 1")


def chunk(number: int) -> bytes:
    """A chunk's KV as vLLM keeps it on the CPU; no two are equal."""
    words = kv_like(SHAPE).view(np.uint16).reshape(SHAPE.shape)
    return native_order(VEC).pack_layers(np.roll(words, number, axis=3), GROUP).tobytes()


def on_real_node(
    test: Callable[[Node], Coroutine[Any, Any, None]],
    options: Mapping[str, Any],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run a test on a node of its own with these options; ends with the conservation laws."""

    async def main() -> None:
        overrides = {"host.capacity": "16MiB", "leases.per_client": "80%", **options}
        node = Node.create(load_config(environ={}, overrides=overrides), clock)
        await node.start()
        try:
            await asyncio.wait_for(test(node), 60)
            node.check_integrity(contents=True)
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())


def store(node: Node, weights: str = "") -> int:
    """Store all chunks that the node says it needs; how many."""
    reserved = at_once(
        node.reserve(ME, p.Reserve(1, NAMESPACE, b"".join(KEYS), 0, 0, TEMPLATE, 0.05, weights))
    )
    sums = []
    for number, offset in enumerate(offsets_of(reserved.offsets)):
        if offset >= 0:
            node.host.pool.view(offset + HEADER_BYTES, NBYTES)[:] = chunk(number)
        sums.append(checksum(chunk(number)))
    return at_once(node.commit(ME, p.Commit(1, reserved.reservation, b"".join(sums)))).count


async def load(node: Node, count: int = 3) -> tuple[list[int], list[bytes]]:
    """Tiers and payloads of the leading chunks; all of them must come."""
    request = p.Match(1, b"".join(KEYS[:count]), [0], [VEC, "portable"], [NBYTES])
    matched = at_once(node.match(ME, request))
    ready, offsets = 0, list(offsets_of(matched.offsets))
    while ready < len(matched.tiers):
        arrived = await arrive(node, ME, matched.lease, ready)
        assert not arrived.failed
        offsets[ready : arrived.ready] = offsets_of(arrived.offsets)
        ready = arrived.ready
    payloads = [bytes(node.host.pool.view(at + HEADER_BYTES, NBYTES)) for at in offsets]
    node.release(ME, p.Release(matched.lease))
    return list(matched.tiers), payloads


def used(node: Node) -> dict[str, int]:
    """Bytes in each slower tier."""
    tiers = node.status(ME, p.Status(1)).state["tiers"]
    return {tier["name"]: tier["used_bytes"] for tier in tiers}


async def timed(node: Node) -> None:
    """Wait until it is known how fast the slower tiers are that need it."""
    for backing in node.backings:
        if backing.load_target_s or (backing.choice is not None and backing.choice.needs_speed):
            await until(lambda b=backing: b.place() is not None)  # type: ignore[misc]
            await until(lambda b=backing: not b.index.claimed_bytes)  # type: ignore[misc]


def stored_codec(node: Node, number: int = 0) -> tuple[str, bytes]:
    """Family and parameters in the header of a chunk in the last tier."""
    backing = node.backings[-1]
    nbytes = backing.find(KEYS[number], 0, None)
    assert nbytes is not None
    with backing._scratch.buffer(nbytes) as data:
        backing.tier.read([object_id(KEYS[number], 0, 0)], [data])
        header = decode(bytes(data[:HEADER_BYTES]))
    return header.codec, header.codec_parameters


async def load_shared(node: Node) -> tuple[list[int], list[bytes]]:
    """Tiers and payloads of the leading chunks that come; stores are asked for them."""
    request = p.Match(1, b"".join(KEYS), [0], [VEC, "portable"], [NBYTES], namespace=NAMESPACE)
    answer = node.match(ME, request)
    matched = await answer if isinstance(answer, Awaitable) else answer
    count, offsets = 0, list(offsets_of(matched.offsets))
    while count < len(matched.tiers):
        arrived = await arrive(node, ME, matched.lease, count)
        offsets[count : arrived.ready] = offsets_of(arrived.offsets)
        count = arrived.ready
        if arrived.failed:
            break
    payloads = [bytes(node.host.pool.view(at + HEADER_BYTES, NBYTES)) for at in offsets[:count]]
    if matched.lease:
        node.release(ME, p.Release(matched.lease))
    return list(matched.tiers[:count]), payloads
