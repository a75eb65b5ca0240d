"""Nodes made from a configuration that share a real Redis."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.nodes import clear, flush, until
from tests.support.real_nodes import KEYS, ME, chunk, load_shared, store

from kvstrata.config import RedisConfig, load_config
from kvstrata.errors import ConfigError
from kvstrata.node.node import Node
from kvstrata.testing.ground import Server
from kvstrata.testing.servers.redis import RedisCluster, RedisServer, installed
from kvstrata.tiers.base import SharedTier
from kvstrata.wire import protocol as p

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

SHARED = 1


@pytest.fixture(params=[RedisServer, RedisCluster])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    server: Server = request.param(tmp_path / "redis")
    yield server
    server.close()


def on_nodes(
    test: Callable[..., Coroutine[Any, Any, None]], url: str, count: int = 2, **options: Any
) -> None:
    """Run a test on nodes with these options of their Redis, once they know its epoch."""
    overrides = {
        "host.capacity": "16MiB",
        "redis": {"url": url, "lookup_timeout": "2s", "epoch_every": "3s", **options},
    }

    async def main() -> None:
        config = load_config(environ={}, overrides=overrides)
        nodes = [Node.create(config) for _ in range(count)]
        try:
            for node in nodes:
                await node.start()
            await asyncio.wait_for(test(*nodes), 60)
            for node in nodes:
                node.check_integrity(contents=True)
        finally:
            for node in nodes:
                await node.stop(drain_s=1.0)

    asyncio.run(main())


async def ready(*nodes: Node) -> None:
    await until(lambda: all(node.backings[0].readable for node in nodes))


def test_what_one_node_stored_another_serves_until_a_clear(server: Any) -> None:
    async def test(a: Node, b: Node) -> None:
        await ready(a, b)
        assert store(a) == len(KEYS)
        await flush(a, ME)
        tiers, payloads = await load_shared(b)
        assert tiers == [SHARED] * len(KEYS)
        assert payloads == [chunk(number) for number in range(len(KEYS))]
        await clear(b, ME)
        assert await load_shared(b) == ([], [])
        tier = a.backings[0].tier
        assert isinstance(tier, SharedTier)
        await until(lambda: tier.epoch().number == a.backings[0].epoch)  # type: ignore[attr-defined]
        state = a.status(ME, p.Status(1)).state["tiers"][0]
        assert state["name"] == "redis"
        assert state["state"] == "ok"

    on_nodes(test, server.url)


def test_the_status_says_what_is_wrong_and_no_password(
    server: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)

    async def test(node: Node) -> None:
        def state() -> str:
            said: str = node.status(ME, p.Status(1)).state["tiers"][0]["state"]
            return said

        await until(lambda: state().startswith("off: "))
        assert "does not let user 'kv' in: " in state()
        assert "hunter2" not in str(node.status(ME, p.Status(1)).state)

    on_nodes(test, server.url.replace("://", "://kv:hunter2@"), count=1)
    assert "does not let user 'kv' in" in caplog.text
    assert "hunter2" not in caplog.text + "".join(capsys.readouterr())


def test_a_configuration_opens_its_tier() -> None:
    overrides = {"redis": {"url": "redis://h", "prefix": "a/b", "ttl": "2s", "epoch_every": "9s"}}
    (part,) = load_config(environ={}, overrides=overrides).tiers
    assert isinstance(part, RedisConfig)
    with pytest.MonkeyPatch.context() as patch:
        given: list[Any] = []
        patch.setattr(
            "kvstrata.tiers.redis.tier.RedisTier", lambda *all, **named: given.append((all, named))
        )
        part.open(None)
    assert given == [((part.url, "a/b"), {"lasts_s": 9.0, "ttl_s": 2.0})]


def test_a_client_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("kvstrata.tiers.redis.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "redis", None)
    (part,) = load_config(environ={}, overrides={"redis.url": "redis://h"}).tiers
    with pytest.raises(ConfigError, match=r"pip install 'kvstrata\[redis\]'"):
        part.open(None)
