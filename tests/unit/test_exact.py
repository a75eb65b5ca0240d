"""``codec = exact``, the disk's default: raw, or lossless where a tier is slow."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.nodes import clear, flush, owned, until
from tests.support.real_nodes import (
    KEYS,
    ME,
    NBYTES,
    chunk,
    load,
    on_real_node,
    store,
    stored_codec,
    timed,
    used,
)

from kvstrata.node.coding import choosing
from kvstrata.node.node import Node
from kvstrata.node.service.probe import PROBE_KEY
from kvstrata.objects import stored_bytes
from kvstrata.parts import identity
from kvstrata.quality.choice import Candidate, Place
from kvstrata.testing.stores import put
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.disk import tier as disk
from kvstrata.tiers.throttled import ThrottledTier
from kvstrata.wire import protocol as p


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"disk.path": tmp_path / "disk", "disk.capacity": "64MiB"}


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = disk.DiskTier
    monkeypatch.setattr(disk, "DiskTier", lambda path: ThrottledTier(inner(path), 100e6))


def decoder(monkeypatch: pytest.MonkeyPatch, bytes_per_s: float) -> None:
    def measured(codec: Any) -> Candidate:
        return Candidate(codec.name, 10.8, bytes_per_s)

    monkeypatch.setattr(choosing, "_timed", measured)


async def stores_as(node: Node, family: str) -> None:
    await timed(node)
    store(node)
    await flush(node, ME)
    assert stored_codec(node)[0] == family
    (tier,) = node.status(ME, p.Status(1)).state["tiers"]
    assert tier["codec"] == f"exact ({family})"
    await clear(node, ME, tiers=["host"])
    assert (await load(node))[1] == [chunk(number) for number in range(3)]


def test_a_slow_tier_stores_losslessly(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    slow_disk(monkeypatch)
    on_real_node(lambda node: stores_as(node, "lossless"), options)


def test_a_slow_decoder_leaves_objects_raw(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    slow_disk(monkeypatch)
    decoder(monkeypatch, 10e6)
    on_real_node(lambda node: stores_as(node, "raw"), options)


@pytest.mark.parametrize(
    ("disk_speed", "decoder_speed", "family"),
    [(500e6, 2e9, "lossless"), (1500e6, 2e9, None), (700e6, 2e9, None), (5e9, 1e12, None)],
)
def test_lossless_has_to_be_clearly_sooner(
    monkeypatch: pytest.MonkeyPatch, disk_speed: float, decoder_speed: float, family: str | None
) -> None:
    decoder(monkeypatch, decoder_speed)
    codec = choosing.Exact().of("", 1.0, Place("disk", 1 << 30, disk_speed, cores=2))
    assert (codec and codec.family) == family


def test_it_is_decided_once_and_not_before_the_tier_was_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder(monkeypatch, 2e9)
    choice = choosing.Exact()
    assert choice.of("", 1.0, None) is None
    assert choice.name == "exact (raw so far)"
    assert choice.of("", 1.0, Place("disk", 1 << 30, 100e6, 2)) is not None
    assert choice.of("", 1.0, Place("disk", 1 << 30, 9e9, 2)) is not None
    assert choice.name == "exact (lossless)"


@pytest.mark.parametrize("family", ["raw", "lossless"])
def test_raw_objects_are_written_without_asking_a_codec(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], family: str
) -> None:
    """Once that is decided; fails where each object goes through a thread for encoding first."""

    async def test(node: Node) -> None:
        choice = owned(node).choice
        assert choice is not None
        assert not choice.always_raw  # nobody knows yet
        await stores_as(node, family)
        assert choice.always_raw == (family == "raw")
        asked.clear()
        await clear(node, ME)
        store(node)
        await flush(node, ME)
        assert len(asked) == (0 if family == "raw" else 3)

    asked: list[str] = []
    ask = choosing.Exact.of

    def noting(self: choosing.Exact, weights: str, *others: Any) -> Any:
        asked.append(weights)
        return ask(self, weights, *others)

    monkeypatch.setattr(choosing.Exact, "of", noting)
    decoder(monkeypatch, 10e6 if family == "raw" else 2e9)
    slow_disk(monkeypatch)
    on_real_node(test, options)


def test_a_broken_codec_leaves_objects_raw(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(codec: object) -> Candidate:
        raise RuntimeError("no such instruction")

    async def test(node: Node) -> None:
        await stores_as(node, "raw")
        assert "bugs_total" not in str(node.counters.snapshot())

    slow_disk(monkeypatch)
    monkeypatch.setattr(choosing, "_timed", broken)
    with caplog.at_level(logging.WARNING):
        on_real_node(test, options)
    assert "no such instruction" in caplog.text


@pytest.mark.bugs
def test_a_bug_in_a_codec_is_counted_once_and_leaves_objects_raw(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def broken(codec: object) -> Candidate:
        raise ValueError("nobody foresaw this")

    async def test(node: Node) -> None:
        await stores_as(node, "raw")
        assert node.counters.get("bugs_total", where="codec exact (raw)") == 1

    slow_disk(monkeypatch)
    monkeypatch.setattr(choosing, "_timed", broken)
    on_real_node(test, options)


def test_it_loses_nothing_so_a_faster_tier_gets_copies_of_what_comes_up(
    options: dict[str, Any],
) -> None:
    async def test(node: Node) -> None:
        await timed(node)
        store(node)
        await flush(node, ME)
        await clear(node, ME, tiers=["host", "memory"])
        assert (await load(node))[0] == [2, 2, 2]
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        assert await load(node) == ([1, 1, 1], [chunk(number) for number in range(3)])

    on_real_node(test, {"memory.capacity": "8MiB", "memory.codec": "exact", **options})


def test_what_is_there_is_read_and_nothing_is_evicted(options: dict[str, Any]) -> None:
    """A tier without room for the object that its speed is measured on."""

    async def first(node: Node) -> None:
        store(node)
        await flush(node, ME)

    async def second(node: Node) -> None:
        await timed(node)
        assert used(node)["disk"] == 3 * stored_bytes(NBYTES)
        assert owned(node).find(KEYS[2], 0, None)

    full = options | {"disk.capacity": "1MiB", "disk.codec": "raw"}
    on_real_node(first, full)
    on_real_node(second, full | {"disk.codec": "exact"})


def test_what_a_killed_node_measured_on_is_deleted(options: dict[str, Any]) -> None:
    name = identity(PROBE_KEY, 0)

    async def test(node: Node) -> None:
        await timed(node)
        assert used(node)["disk"] == 0
        assert owned(node).tier.stat([name]) == [Outcome.MISS]

    left = disk.DiskTier(options["disk.path"])
    left.write([put(name, memoryview(bytes(4096)))])
    left.close()
    on_real_node(test, options)


def test_a_disk_that_hangs_while_it_is_timed_is_off(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    hanging = threading.Event()

    class Hanging(disk.DiskTier):
        def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
            hanging.wait(20)
            return super().read(ids, into)

    async def test(node: Node) -> None:
        try:
            await until(lambda: owned(node).state.startswith("off: no read has ended"), 20.0)
        finally:
            hanging.set()
        await until(lambda: owned(node).state == "ok")
        store(node)
        await flush(node, ME)

    monkeypatch.setattr(disk, "DiskTier", Hanging)
    on_real_node(test, options | {"deadlines.load": "300ms"})
