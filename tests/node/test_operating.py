"""An operator's work on nodes of real processes: killed in the middle of it, or told to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.node.conftest import wait_for_end
from tests.support.attached import Attached
from tests.support.nodes import NAMESPACE, ORDER, chunk_keys

from kvstrata.config import Config, load_config
from kvstrata.testing.servers.redis import RedisServer, installed
from kvstrata.wire.launch import connect
from kvstrata.wire.operator import Operator


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    if not installed():
        pytest.skip("there is no redis-server here")
    server = RedisServer(tmp_path / "redis")
    yield server
    server.close()


@pytest.fixture
def attach(config: Config, tmp_path: Path) -> Iterator[Callable[..., Attached]]:
    """Makes clients of the node with a disk, and with a Redis if there is one; it is up by then."""
    clients = []

    def make(url: str = "") -> Attached:
        given = config.to_dict() | {
            "host": {"capacity": "16MiB"},
            "disk": {"path": str(tmp_path / "disk"), "capacity": "64MiB", "codec": "raw"},
        }
        if url:
            given["redis"] = {"url": url, "lookup_timeout": "10s", "codec": "raw"}
        clients.append(connect(load_config(environ={}, overrides=given)))
        attached = Attached(clients[-1])

        def up() -> bool:
            return all(tier["state"] == "ok" for tier in clients[-1].status()["tiers"])

        attached.until(up, 60.0)
        return attached

    yield make
    for client in clients:
        client.close()


def test_a_node_that_is_killed_in_a_move_has_lost_nothing(
    attach: Callable[..., Attached], redis: RedisServer
) -> None:
    node, keys = attach(redis.url), chunk_keys(200)
    operator = Operator(node.client)
    for first in range(0, 200, 100):
        node.store(keys[first : first + 100])
        node.client.flush()
    for tier in ("host", "redis"):
        node.client.clear(keys, [tier])
    number = operator.copy(keys, "disk", "redis", [0], [ORDER], NAMESPACE, move=True)
    node.until(lambda: operator.job(number).done >= 20, 60.0)
    redis.pause()  # whatever it is at now, it does not come to its end
    os.kill(node.client.hello.pid, signal.SIGKILL)
    assert wait_for_end(node.client.hello.pid, 30.0)
    redis.resume()
    again = attach(redis.url)
    assert again.client.hello.pid != node.client.hello.pid
    tiers = again.get(keys)
    assert len(tiers) == 200, "one of them is in neither, or behind a hole"
    assert 2 in tiers, "it had not begun"
    rest = Operator(again.client)
    job = rest.wait(rest.copy(keys, "disk", "redis", [0], [ORDER], NAMESPACE, move=True), 60.0)
    assert (job.state, job.failed) == ("done", 0)
    assert next(rest.chunks("disk"), None) is None, "asked again, it ends what was begun"
    again.client.clear(tiers=["host"])
    assert again.get(keys) == [2] * 200


def test_a_node_that_is_told_to_end_has_written_all(attach: Callable[..., Attached]) -> None:
    node, keys = attach(), chunk_keys(50)
    node.store(keys)
    lease = node.match(keys).lease
    Operator(node.client).drain(end=True)
    node.client.release(lease)
    assert wait_for_end(node.client.hello.pid, 60.0)
    again = attach()
    assert again.client.hello.pid != node.client.hello.pid
    assert again.get(keys) == [1] * 50
