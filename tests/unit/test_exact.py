"""``codec = exact``, the disk's default: raw or lossless, whichever the tier gives back sooner."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.nodes import clear, flush, until
from tests.support.real_nodes import KEYS, ME, chunk, load, on_real_node, store, stored_codec

from kvstrata.node import protocol as p
from kvstrata.node import trial
from kvstrata.node.node import Node
from kvstrata.node.recoding import restored_object
from kvstrata.tiers import disk
from kvstrata.tiers.throttled import ThrottledTier


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"disk.path": tmp_path / "disk", "disk.capacity": "64MiB"}


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = disk.DiskTier
    monkeypatch.setattr(disk, "DiskTier", lambda path: ThrottledTier(inner(path), 100e6))


def slow_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def restored(data: memoryview, object_id: bytes, into: memoryview) -> None:
        restored_object(data, object_id, into)
        time.sleep(0.2 * (len(data) < len(into)))

    monkeypatch.setattr(trial, "restored_object", restored)


async def stores_as(node: Node, family: str, number: int = 0) -> None:
    await until(lambda: node.backings[0].state == "ok")
    store(node)
    await flush(node, ME)
    assert stored_codec(node, number)[0] == family
    (tier,) = node.status(ME, p.Status(1)).state["tiers"]
    assert tier["codec"] == f"exact ({family})"
    await clear(node, ME, tiers=["host"])
    assert (await load(node))[1] == [chunk(number) for number in range(3)]


def test_a_slow_tier_stores_losslessly(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    slow_disk(monkeypatch)
    on_real_node(lambda node: stores_as(node, "lossless"), options)


def test_a_tier_faster_than_the_decoder_stores_raw(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    slow_decoder(monkeypatch)
    on_real_node(lambda node: stores_as(node, "raw"), options)


def test_another_start_decides_anew(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    async def test(node: Node) -> None:
        await until(lambda: node.backings[0].state == "ok")
        assert node.backings[0].index.num_objects == 3, "nothing is left of a trial"
        assert (await load(node))[1] == [chunk(number) for number in range(3)]
        await node.backings[0].drop([KEYS[0]])
        await clear(node, ME, tiers=["host"])
        await stores_as(node, "raw")

    slow_disk(monkeypatch)
    on_real_node(lambda node: stores_as(node, "lossless"), options)
    slow_decoder(monkeypatch)
    on_real_node(test, options)


def test_a_broken_codec_leaves_objects_raw(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def broken(data: memoryview, object_id: bytes, into: memoryview) -> None:
        raise RuntimeError("no such instruction")

    async def test(node: Node) -> None:
        await stores_as(node, "raw")
        assert node.counters.get("bugs_total", where="the trial of disk") == 1

    monkeypatch.setattr(trial, "restored_object", broken)
    on_real_node(test, options)
