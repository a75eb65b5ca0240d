"""A fleet's clear is exact: nothing from before it is served after it, whoever was away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support.nodes import chunk_keys
from tests.support.registries import SHORT_S, Fleet, Line, Node, fleet_in, until

from kvstrata.fleet import commands
from kvstrata.testing.servers.redis import installed
from kvstrata.wire import protocol as p

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

OLD, NEW, MADE_AWAY = (chunk_keys(4, prompt) for prompt in range(3))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_in(tmp_path) as fleet:
        yield fleet


@pytest.fixture
def fleeting(tmp_path: Path) -> Iterator[Fleet]:
    """One whose registrations run out soon."""
    with fleet_in(tmp_path, SHORT_S) as fleet:
        yield fleet


@pytest.fixture
def line(fleeting: Fleet) -> Iterator[Line]:
    with contextlib.closing(Line(fleeting.server.port)) as line:
        yield line


def store_of(fleet: Fleet) -> dict[str, Any]:
    """The same server is the nodes' shared store, which none of them loses."""
    return {
        "redis.url": fleet.server.url,
        "redis.lookup_timeout": "2s",
        "redis.epoch_every": "2s",
    }


def keep(node: Node, keys: list[bytes]) -> None:
    """Store them, also in the shared store, and forget them in host memory."""
    until(lambda: node.inprocess.node.backings[0].writable)
    node.store(keys)
    node.client.flush()
    node.client.clear(keys, ["host"])


def epoch(node: Node) -> Any:
    return node.client.status()["tiers"][0]["epoch"]


def clear(fleet: Fleet) -> commands.Answers:
    return commands.give(fleet.registry, p.Clear(0), 30.0)


def test_a_node_that_is_cut_off_serves_nothing_of_before_and_spoils_nothing_of_after(
    fleeting: Fleet, line: Line
) -> None:
    a = fleeting.join("a", **store_of(fleeting))
    b = fleeting.join("b", **{**store_of(fleeting), "fleet.registry": line.url})
    keep(a, OLD)
    until(lambda: len(b.get(OLD)) == len(OLD))
    b.client.clear(OLD, ["host"])
    line.cut()
    until(lambda: "b" not in fleeting.members())
    answers = clear(fleeting)
    assert answers.done
    assert sorted(answers.answered) == ["a"]
    # From now on nothing of before may come out of the store, nor get into it.
    assert b.get(OLD) == []
    b.store(MADE_AWAY)
    b.client.flush()
    keep(a, NEW)
    line.mend()
    until(lambda: b.good)
    assert b.fleet.shown()["seen"] == 1
    assert b.has(MADE_AWAY) == 0
    assert a.get(MADE_AWAY) == []
    assert a.get(OLD) == []
    # What was stored since is still there, for the late one, too.
    until(lambda: len(b.get(NEW)) == len(NEW))
    assert len(a.get(NEW)) == len(NEW)


def test_who_may_have_stored_after_the_command_clears_the_store_again_and_only_he(
    fleet: Fleet,
) -> None:
    a = fleet.join("a", **store_of(fleet))
    b = fleet.join("b", **store_of(fleet))
    for node in (a, b):
        until(lambda node=node: epoch(node))  # type: ignore[misc]
    # It is registered still, and ends without having heard of it.
    b.inprocess.run(b.fleet._tasks.cancel)
    with ThreadPoolExecutor(1) as threads:
        clearing = threads.submit(clear, fleet)
        until(lambda: fleet.members()["a"].seen == 1)
        b.fleet._boot = 0  # it ends without saying so
        b.close()
        before = epoch(a)
        b = fleet.join("b", **store_of(fleet))
        assert clearing.result().done
    until(lambda: epoch(a) not in (None, before))
    now = epoch(a)
    b.close()
    for name in ("b", "new"):
        node = fleet.join(name, **store_of(fleet))
        assert node.fleet.shown()["seen"] == 1
        until(lambda node=node: epoch(node))  # type: ignore[misc]
        assert epoch(node) == now


def test_nothing_comes_back_from_a_peer_that_has_not_forgotten_it_yet(fleet: Fleet) -> None:
    peers = {"network.listen": "127.0.0.1:0", "peer.nodes": "fleet", "peer.lookup_timeout": "2s"}
    a, b = fleet.join("a", **peers), fleet.join("b", **peers)
    a.store(OLD)
    a.told()
    until(lambda: len(b.get(OLD)) == len(OLD))
    obey, free = a.fleet._obey.carry_out, asyncio.Event()

    async def later(*arguments: Any) -> Any:
        await free.wait()
        return await obey(*arguments)

    a.fleet._obey.carry_out = later  # type: ignore[method-assign,assignment]
    with ThreadPoolExecutor(1) as threads:
        clearing = threads.submit(clear, fleet)
        until(lambda: fleet.members()["b"].seen == 1)
        assert a.has(OLD) == len(OLD)
        assert b.get(OLD) == []
        a.inprocess.run(free.set)
        assert clearing.result().done
    until(lambda: b.fleet.standing.meets_peers())
    a.store(NEW)
    a.told()
    until(lambda: len(b.get(NEW)) == len(NEW))
    assert a.has(OLD) == b.has(OLD) == 0
    assert b.get(OLD) == []


def test_whoever_missed_more_than_the_registry_knows_forgets_all_that_is_his(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "MAX_COMMANDS", 2)
    disk = {"disk.path": str(fleet.folder / "disk"), "disk.capacity": "1MiB"}
    fleet.join("a")
    b = fleet.join("b", **disk)
    b.store(OLD)
    b.client.flush()
    b.close()
    for _ in range(3):
        commands.give(fleet.registry, p.Flush(0), 20.0)
    b = fleet.join("b", **disk)
    assert b.has(OLD) == 0
    b.store(OLD)
    b.client.flush()
    b.close()
    for _ in range(2):
        commands.give(fleet.registry, p.Flush(0), 20.0)
    b = fleet.join("b", **disk)
    until(lambda: b.has(OLD) == len(OLD))
