"""A node with real slower tiers and codecs: what lies where, and what is stored again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.nodes import NAMESPACE, arrive, chunk_keys, clear, flush, until

from kvstrata.client import offsets_of
from kvstrata.codecs.base import Payload
from kvstrata.config import load_config
from kvstrata.layout import LayerGroup, native_order
from kvstrata.node import protocol as p
from kvstrata.node.clients import Client
from kvstrata.node.node import Node
from kvstrata.objects import HEADER_BYTES, checksum, stored_bytes
from kvstrata.testing.codecs import kv_like

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


def on_real_node(test: Callable[[Node], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        overrides = {"host.capacity": "16MiB", "leases.per_client": "80%", **options}
        node = Node.create(load_config(environ={}, overrides=overrides))
        await node.start()
        try:
            await asyncio.wait_for(test(node), 60)
            node.check_integrity()
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())


def store(node: Node) -> int:
    """Store all chunks that the node says it needs; how many."""
    reserved = node.reserve(ME, p.Reserve(1, NAMESPACE, b"".join(KEYS), 0, 0, TEMPLATE))
    sums = []
    for number, offset in enumerate(offsets_of(reserved.offsets)):
        if offset >= 0:
            node.host.pool.view(offset + HEADER_BYTES, NBYTES)[:] = chunk(number)
        sums.append(checksum(chunk(number)))
    return node.commit(ME, p.Commit(1, reserved.reservation, b"".join(sums))).count


async def load(node: Node, count: int = 3) -> tuple[list[int], list[bytes]]:
    """Tiers and payloads of the leading chunks; all of them must come."""
    request = p.Match(1, b"".join(KEYS[:count]), [0], [VEC, "portable"], [NBYTES])
    matched = node.match(ME, request)
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
    tiers = node.status(ME, p.Status(1)).state["tiers"]
    return {tier["name"]: tier["used_bytes"] for tier in tiers}


def test_encoded_objects_in_host_memory() -> None:
    async def test(node: Node) -> None:
        assert store(node) == 3
        await flush(node, ME)
        assert 0 < used(node)["memory"] < 0.75 * 3 * stored_bytes(NBYTES)
        await clear(node, ME, tiers=["host"])
        tiers, payloads = await load(node)
        assert tiers == [1, 1, 1]
        assert payloads == [chunk(number) for number in range(3)]

    on_real_node(test, **{"memory.capacity": "8MiB"})


def test_memory_before_disk(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        assert store(node) == 3
        await flush(node, ME)
        both = used(node)
        assert both["memory"] == both["disk"] > 0, "the same codec, the same bytes"
        await clear(node, ME, tiers=["host", "memory"])
        assert used(node)["memory"] == 0
        tiers, payloads = await load(node, 2)
        assert tiers == [2, 2]
        assert payloads == [chunk(0), chunk(1)]
        await flush(node, ME)
        assert used(node)["memory"] == both["memory"] // 3 * 2, "what was read is kept nearer"
        await clear(node, ME, tiers=["host"])
        tiers, payloads = await load(node)
        assert tiers == [1, 1, 2]
        assert payloads == [chunk(number) for number in range(3)]

    on_real_node(
        test,
        **{
            "memory.capacity": "8MiB",
            "disk.path": tmp_path / "disk",
            "disk.capacity": "8MiB",
            "disk.codec": "lossless",
        },
    )


@pytest.mark.parametrize("restart", [False, True])
def test_what_a_lossy_codec_gave_back_is_never_encoded_again(tmp_path: Path, restart: bool) -> None:
    """KV that an engine loaded from such a tier is less than exact; storing it loses once more."""
    options = {
        "disk.path": tmp_path / "disk",
        "disk.capacity": "8MiB",
        "disk.codec": "cachegen-2",
        "memory.capacity": "8MiB",
        "memory.codec": "cachegen-4",
    }

    async def first(node: Node) -> None:
        assert store(node) == 3
        await flush(node, ME)
        if not restart:
            await second(node)

    async def second(node: Node) -> None:
        await until(lambda: node.backings[1].state == "ok")
        await clear(node, ME, tiers=["host", "memory"])
        before = used(node)
        assert store(node) == 0, "the engine's copy may have come from here"
        tiers, payloads = await load(node)
        assert tiers == [2, 2, 2]
        assert payloads[0] != chunk(0)
        assert store(node) == 0
        await flush(node, ME)
        assert used(node) == before

    on_real_node(first, **options)
    if restart:
        on_real_node(second, **options)
