"""Nodes of a fleet that share a real Mooncake Store, made from a configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    RAW,
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

from kvstrata.config import load_config
from kvstrata.config.mooncake import MooncakeConfig
from kvstrata.errors import ConfigError
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.testing.servers.mooncake import MooncakeServer, installed
from kvstrata.tiers.mooncake import client as clients
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

needs_mooncake = pytest.mark.skipif(not installed(), reason="Mooncake's package is not here")

KEYS = chunk_keys(4)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeServer]:
    server = MooncakeServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def configured(**options: Any) -> MooncakeConfig:
    config = load_config(environ={}, overrides={"mooncake": {"master": "m:1", **options}})
    (part,) = config.tiers
    assert isinstance(part, MooncakeConfig)
    return part


async def get(node: Node) -> int:
    """Match, load and compare; how many chunks came."""
    me = Client("pid 1")
    answer = node.match(me, p.Match(1, b"".join(KEYS), [0], [ORDER], [RAW], namespace=NAMESPACE))
    matched = await answer if isinstance(answer, Awaitable) else answer
    offsets, ready = list(offsets_of(matched.offsets)), 0
    while ready < len(matched.tiers):
        arrived = await arrive(node, me, matched.lease, ready)
        offsets[ready : arrived.ready] = offsets_of(arrived.offsets)
        ready = arrived.ready
        if arrived.failed:
            break
    for key, offset in zip(KEYS[:ready], offsets, strict=False):
        assert stored_payload(node, offset) == payload(key), "other bytes came back"
    if matched.lease:
        release(node, me, matched.lease)
    return ready


@needs_mooncake
@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("registering", [False, True])
def test_what_one_node_stores_another_loads(
    server: MooncakeServer, monkeypatch: pytest.MonkeyPatch, codec: str, registering: bool
) -> None:
    if registering:
        monkeypatch.setattr(clients, "NEED_NO_REGISTRATION", frozenset())
    overrides = {
        "host.capacity": "1MiB",
        "mooncake": {
            "master": server.address, "codec": codec, "epoch_every": "1s", "lookup_timeout": "2s"
        },
    }  # fmt: skip

    async def main() -> None:
        me = Client("pid 1")
        nodes = [Node.create(load_config(environ={}, overrides=overrides)) for _ in range(2)]
        try:
            for node in nodes:
                await node.start()
            for node in nodes:
                await until(lambda b=node.backings[0]: b.readable)  # type: ignore[misc]
            writer, reader = nodes
            assert store(writer, me, KEYS) == len(KEYS)
            await flush(writer, me)
            assert await get(reader) == len(KEYS)
            await clear(writer, me)
            await clear(reader, me, tiers=["host"])
            assert await get(reader) == 0
            for node in nodes:
                node.check_integrity()
        finally:
            for node in nodes:
                await node.stop(drain_s=1.0)

    asyncio.run(main())


@needs_mooncake
def test_the_tier_has_the_nodes_pool(
    server: MooncakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "NEED_NO_REGISTRATION", frozenset())
    overrides = {"host.capacity": "1MiB", "mooncake.master": server.address}

    async def main() -> None:
        node = Node.create(load_config(environ={}, overrides=overrides))
        try:
            tier: Any = node.backings[0].tier
            with tier._client.use() as current:
                await until(lambda: current.memory.registered_bytes == 1 << 20)
                with current.memory.lend([node.host.pool.view(4096, 8192)]) as (loan,):
                    assert loan.direct
                    assert loan.address == node.host.pool.address + 4096
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())


@needs_mooncake
def test_a_node_without_a_master_serves(tmp_path: Any) -> None:
    """The tier waits for it."""
    overrides = {"host.capacity": "1MiB", "mooncake.master": "127.0.0.1:1"}

    async def main() -> None:
        node, me = Node.create(load_config(environ={}, overrides=overrides)), Client("pid 1")
        await node.start()
        try:
            assert store(node, me, KEYS) == len(KEYS)
            assert await get(node) == len(KEYS)
            await until(lambda: node.backings[0].state.startswith("off"))
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())


def test_options() -> None:
    part = configured()
    assert str(part.master) == "m:1"
    assert part.host_bytes == part.segment == 0
    assert configured(segment="4MiB").host_bytes == 4 << 20
    assert configured(protocol="rdma", device="mlx5_0").device == "mlx5_0"
    assert str(configured(master="[fe80::1]:50051").master) == "[fe80::1]:50051"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"master": "host"}, r"mooncake.master.*a host and a port"),
        ({"master": "host:0"}, r"mooncake.master"),
        ({"master": "host:65536"}, r"mooncake.master"),
        ({"prefix": "a b"}, r"mooncake.prefix.*letters, digits"),
        ({"prefix": "x" * 65}, r"mooncake.prefix.*too long"),
        ({"protocol": "udp"}, r"mooncake.protocol"),
        ({"segment": "1KiB"}, r"mooncake.segment.*expected 0, or a size"),
        ({"segment": "9000TiB"}, r"mooncake.segment.*more than the memory"),
        ({"replicas": 0}, r"mooncake.replicas"),
        ({"soft_pin": "yes"}, r"mooncake.soft_pin"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured(**options)
