"""Whoever watches a node's own tiers knows at any time what they hold, and why the rest left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support.nodes import (
    chunk_keys,
    clear,
    flush,
    load,
    on_node,
    owned,
    store,
    until,
)

from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.tiers.faulty import FaultyTier, FlipBit
from kvstrata.tiers.memory import MemoryTier


class Mirror:
    """What is where, from nothing but what was told."""

    def __init__(self, node: Node) -> None:
        self.held: dict[str, set[tuple[bytes, int]]] = {"host": set(), owned(node).name: set()}
        self.causes: list[tuple[str, Cause]] = []
        self._node = node
        node.changes.watch(self)

    def entered(self, tier: str, key: bytes, part: int) -> None:
        self.held[tier].add((key, part))

    def found(self, tier: str, names: Sequence[tuple[bytes, int]]) -> None:
        assert self.held[tier].isdisjoint(names)
        self.held[tier].update(names)

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        self.held[tier].remove((key, part))
        self.causes.append((tier, cause))

    def emptied(self, tier: str) -> None:
        self.held[tier].clear()

    def check(self) -> None:
        backing = owned(self._node)
        for name, index in (("host", self._node.host.index), (backing.name, backing.index)):
            there = {(key, part) for key in list(index.keys()) for part, _ in index.objects(key)}
            assert self.held[name] == there


def test_stores_evictions_and_clears() -> None:
    async def test(node: Node) -> None:
        me, mirror = Client("pid 1"), Mirror(node)
        disk = owned(node).name
        for prompt in range(6):
            store(node, me, chunk_keys(3, prompt))
            await flush(node, me)
            mirror.check()
        assert set(mirror.causes) == {("host", Cause.EVICTED), (disk, Cause.EVICTED)}
        mirror.causes.clear()
        await clear(node, me, keys=chunk_keys(3, 5))
        mirror.check()
        assert set(mirror.causes) == {("host", Cause.CLEARED), (disk, Cause.CLEARED)}
        await clear(node, me, tiers=[disk])
        assert not mirror.held[disk]
        assert mirror.held["host"]
        mirror.check()

    on_node(test, slots=8, tier=MemoryTier(), tier_slots=12)


def test_what_was_damaged(tmp_path: Path) -> None:
    tier = FaultyTier(DiskTier(tmp_path))
    tier.inject("write", FlipBit(bit=8 * 6000), times=1)

    async def test(node: Node) -> None:
        me, mirror = Client("pid 1"), Mirror(node)
        store(node, me, chunk_keys(1))
        await flush(node, me)
        await clear(node, me, tiers=["host"])
        assert await load(node, me, chunk_keys(1)) == 0
        await until(lambda: (owned(node).name, Cause.CORRUPT) in mirror.causes)
        mirror.check()

    on_node(test, tier=tier)


def test_what_a_tier_has_lost(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)

    async def test(node: Node) -> None:
        me, mirror = Client("pid 1"), Mirror(node)
        store(node, me, chunk_keys(1))
        await flush(node, me)
        await clear(node, me, tiers=["host"])
        tier.delete([found.object_id for batch in tier.scan() for found in batch])
        assert await load(node, me, chunk_keys(1)) == 0
        await until(lambda: (owned(node).name, Cause.LOST) in mirror.causes)
        mirror.check()

    on_node(test, tier=tier)


def test_what_a_scan_finds(tmp_path: Path) -> None:
    async def fill(node: Node) -> None:
        me = Client("pid 1")
        for prompt in range(3):
            store(node, me, chunk_keys(3, prompt))
        await flush(node, me)

    async def test(node: Node) -> None:
        mirror, backing = Mirror(node), owned(node)
        gone, *others = sorted(key for prompt in range(3) for key in chunk_keys(3, prompt))
        await until(lambda: backing.state == "ok")
        mirror.check()
        assert node.counters.get("entered_objects_total", tier=backing.name) == 9
        directory = node.operations.directory
        assert directory.after([backing.name], b"", 9) == [gone, *others]
        await clear(node, Client("pid 1"), keys=[gone])
        assert directory.after([backing.name], b"", 9) == others
        mirror.check()

    on_node(fill, tier=DiskTier(tmp_path))
    on_node(test, tier=DiskTier(tmp_path))
