"""The canary: it goes through every tier, leaves nothing, and says what does not come back."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.support.nodes import (
    SLOT,
    GatedTier,
    chunk_keys,
    flush,
    load,
    match,
    on_node,
    owned,
    release,
    store,
    until,
)
from tests.support.real_nodes import on_real_node, used

from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p

ME = Client("pid 1")


def seconds(node: Node) -> set[tuple[str, str]]:
    """Tier and verb of what was measured."""
    return {
        (one.labels["tier"], one.labels["verb"])
        for one in node.measures.answer(ME, p.Metrics(1)).distributions
        if one.name == "canary_seconds"
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"disk.codec": "int4"},
        {"memory.capacity": "4MiB", "memory.codec": "lossless"},
    ],
)
def test_it_comes_back_from_every_tier_and_leaves_nothing(
    options: dict[str, Any], tmp_path: Path
) -> None:
    async def test(node: Node) -> None:
        await until(lambda: all(backing.state == "ok" for backing in node.backings))
        tiers = ["host", *(backing.name for backing in node.backings)]
        assert "disk" in tiers
        for tier in tiers:
            assert await node.canary.send(tier) == "ok"
            assert node.counters.get("canaries_total", tier=tier, outcome="ok") == 1
        assert node.canary.came_back == dict.fromkeys(tiers, True)
        verbs = ("store", "read", "remove")
        assert seconds(node) == {(tier, verb) for tier in tiers for verb in verbs}
        assert node.host.allocated_bytes == 0
        # A look at how fast the disk is, at the start, takes some bytes for a moment.
        await until(lambda: set(used(node).values()) == {0})
        assert not list((tmp_path / "disk").rglob("*.kv*"))

    disk = {"disk.path": str(tmp_path / "disk"), "disk.capacity": "4MiB"}
    on_real_node(test, {**disk, **options, "canary": "off"})


def test_it_comes_back_encrypted(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("11" * 32 + "\n")
    keys.chmod(0o600)

    async def test(node: Node) -> None:
        await until(lambda: node.backings[0].state == "ok")
        assert await node.canary.send("disk") == "ok"

    on_real_node(test, {
        "disk.path": str(tmp_path / "disk"), "disk.capacity": "4MiB", "canary": "off",
        "disk.encryption": f"file:{keys}",
    })  # fmt: skip


def test_a_full_tier_takes_it_and_loses_no_more_than_a_chunk() -> None:
    async def test(node: Node) -> None:
        for prompt in range(4):
            store(node, ME, chunk_keys(2, prompt))
            await flush(node, ME)
        assert await node.canary.send("memory") == await node.canary.send("host") == "ok"
        assert [len(node.host.index), len(owned(node).index)] == [7, 7]

    on_node(test, tier=MemoryTier(), slots=8, tier_slots=8)


class Liar(MemoryTier):
    """Loses what it is given, or gives back other bytes with a checksum that fits."""

    loses = False

    def read(self, ids: Any, into: Any) -> Any:
        if self.loses:
            self._objects.clear()
        return super().read(ids, into)


def test_what_does_not_come_back_is_said_once_with_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tier = Liar()

    async def test(node: Node) -> None:
        await until(lambda: owned(node).state == "ok")
        tier.loses = True
        assert await node.canary.send("memory") == "failed"
        assert await node.canary.send("memory") == "failed"
        assert node.canary.came_back == {"memory": False}
        assert node.counters.get("canaries_total", tier="memory", outcome="failed") == 2
        (said,) = [one for one in caplog.records if "canary" in one.message]
        assert said.levelname == "ERROR"
        assert "memory has not come back: it did not come back" in said.message
        assert "kvstrata doctor" in said.message
        tier.loses = False
        assert await node.canary.send("memory") == "ok"
        assert caplog.records[-1].message == "the canary of memory comes back again"

    with caplog.at_level(logging.INFO):
        on_node(test, tier=tier)


def test_a_tier_that_is_off_fails_it_and_one_that_may_not_be_written_does_not() -> None:
    async def test(node: Node) -> None:
        owned(node).trip(OSError("the disk is gone"))
        assert await node.canary.send("memory") == "failed"
        assert await node.canary.send("host") == "ok"
        assert node.canary.came_back == {"memory": False, "host": True}

    on_node(test, tier=MemoryTier())


def test_a_tier_that_is_scanned_is_not_held_against_it() -> None:
    tier = GatedTier()
    tier.shut("scan")

    async def test(node: Node) -> None:
        assert await node.canary.send("memory") == "skipped"
        assert node.canary.came_back == {}
        tier.open()

    on_node(test, tier=tier)


def test_other_bytes_in_host_memory_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        publish = node.host.publish

        def damaging(key: bytes, part: int, slot: Any, order: str, cost: float = 0.0) -> None:
            node.host.pool.view(slot.offset + 5000, 1)[0] ^= 1
            publish(key, part, slot, order, cost)

        monkeypatch.setattr(node.host, "publish", damaging)
        assert await node.canary.send("host") == "failed"
        assert node.host.allocated_bytes == 0

    on_node(test)


def test_other_bytes_from_a_tier_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        backing = owned(node)
        await until(lambda: backing.state == "ok")
        read = backing.read

        async def damaging(key: bytes, part: int, nbytes: int, into: memoryview) -> Any:
            header = await read(key, part, nbytes, into)
            into[5000] ^= 1
            return header

        monkeypatch.setattr(backing, "read", damaging)
        assert await node.canary.send("memory") == "failed"
        assert backing.index.used_bytes == 0

    on_node(test, tier=MemoryTier())


def test_a_pool_in_which_all_is_leased_fails_it() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(2)
        store(node, ME, keys)
        matched = match(node, ME, keys)
        assert await node.canary.send("host") == "failed"
        release(node, ME, matched.lease)
        assert await node.canary.send("host") == "ok"

    on_node(test, slots=2)


def test_one_that_hangs_holds_up_no_other_tier() -> None:
    tier = GatedTier()

    async def test(node: Node) -> None:
        tier.shut("write")
        node.canary.start(0.01, node._tasks)
        await until(lambda: node.counters.get("canaries_total", tier="host", outcome="ok") >= 3)
        assert node.counters.get("canaries_total", tier="memory", outcome="ok") == 0
        tier.open()
        await until(lambda: node.counters.get("canaries_total", tier="memory", outcome="ok") >= 1)
        keys = chunk_keys(3)
        store(node, ME, keys)
        assert await load(node, ME, keys) == 3, "requests go on beside it"
        await asyncio.gather(*[_end(task) for task in _canaries(node)])

    on_node(test, tier=tier)


def _canaries(node: Node) -> list[asyncio.Task[Any]]:
    return [task for task in node._tasks._tasks if task.get_name().startswith("the canary")]


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_node_sends_them_as_it_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        names = {task.get_name() for task in _canaries(node)}
        assert names == {"the canary of host", "the canary of memory"}

    on_node(test, tier=MemoryTier())
    assert SLOT
