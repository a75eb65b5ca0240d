"""Loads with a target, through a node and a real disk behind a link whose speed the test decides.

The clock is the test's: the link's waiting moves it on, so nothing depends on the machine.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.support.nodes import arrive, at_once, clear, flush, owned, until
from tests.support.real_nodes import (
    KEYS,
    ME,
    NBYTES,
    VEC,
    chunk,
    load,
    on_real_node,
    store,
    timed,
    used,
)

from kvstrata.errors import ConfigError
from kvstrata.node.node import Node
from kvstrata.node.service.bandwidth import Bandwidth
from kvstrata.objects import HEADER_BYTES, decode, stored_bytes
from kvstrata.testing.clock import ManualClock
from kvstrata.tiers.throttled import ThrottledTier
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

RAW_S = stored_bytes(NBYTES) / 100e6  # what one raw chunk takes at 100 MB/s


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "disk.path": tmp_path / "disk",
        "disk.capacity": "8MiB",
        "disk.coarser": "cachegen-2, cachegen-5",
        "disk.load_target": f"{3.6 * RAW_S * 1000:.1f}ms",
        "disk.io_threads": 1,
        "deadlines.load": "1h",
    }


class Believed(Bandwidth):
    """What the node believes a link to bring, whatever it measures."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(lambda: 0.0)
        self.rate = bytes_per_s

    @property
    def bytes_per_s(self) -> float:
        return self.rate


def slow_down(node: Node, clock: ManualClock, bytes_per_s: float) -> ThrottledTier:
    backing = owned(node, -1)
    inner = backing.tier.inner if isinstance(backing.tier, ThrottledTier) else backing.tier
    tier = ThrottledTier(inner, bytes_per_s, clock=clock, sleep=clock.advance)
    backing.tier, backing.bandwidth = tier, Believed(bytes_per_s)
    return tier


def levels(node: Node) -> dict[str, float]:
    """How many objects were read at each level so far."""
    counters = node.status(ME, p.Status(1)).state["counters"]
    prefix = "streamed_objects_total{"
    return {
        name.split('level="')[1].split('"')[0]: count
        for name, count in counters.items()
        if name.startswith(prefix)
    }


async def prepare(node: Node) -> None:
    await timed(node)
    assert store(node) == 3
    await flush(node, ME)
    await clear(node, ME, tiers=["host"])


def test_a_link_that_is_fast_enough_brings_the_exact_bytes(options: dict[str, Any]) -> None:
    clock = ManualClock()

    async def test(node: Node) -> None:
        await prepare(node)
        slow_down(node, clock, 100e6)
        assert (await load(node))[1] == [chunk(number) for number in range(3)]
        assert levels(node) == {"0": 3}

    on_real_node(test, options, clock)


def test_a_slower_link_brings_coarser_copies_in_time(options: dict[str, Any]) -> None:
    clock = ManualClock()

    async def test(node: Node) -> None:
        await prepare(node)
        slow_down(node, clock, 40e6)
        began = clock()
        tiers, payloads = await load(node)
        assert tiers == [1, 1, 1]
        assert clock() - began <= node.backings[-1].load_target_s
        read = levels(node)
        assert read.get("1", 0) > 0
        assert "given up" not in read
        assert any(one != chunk(number) for number, one in enumerate(payloads))

    on_real_node(test, options, clock)


def test_a_coarser_copy_serves_one_load_only(options: dict[str, Any]) -> None:
    clock = ManualClock()

    async def test(node: Node) -> None:
        await prepare(node)
        slow_down(node, clock, 10e6)
        assert all(one != chunk(number) for number, one in enumerate((await load(node))[1]))
        await until(lambda: not node.movement.filling())
        assert len(node.host.index) == 0
        slow_down(node, clock, 1e9)
        assert (await load(node))[1] == [chunk(number) for number in range(3)]

    on_real_node(test, options, clock)


def test_a_reader_of_one_order_gets_the_object_itself(options: dict[str, Any]) -> None:
    """Coarser copies are in the portable order."""
    clock = ManualClock()

    async def test(node: Node) -> None:
        await prepare(node)
        slow_down(node, clock, 1e6)
        node.reservations._costs[stored_bytes(NBYTES)] = 1e9
        matched = at_once(node.match(ME, p.Match(1, b"".join(KEYS), [0], [VEC], [NBYTES])))
        assert (await arrive(node, ME, matched.lease, 2)).ready == 3
        assert levels(node) == {"0": 3}
        node.release(ME, p.Release(matched.lease))

    on_real_node(test, options, clock)


def test_a_coarser_copy_that_is_gone_is_not_missed(options: dict[str, Any]) -> None:
    clock = ManualClock()

    async def test(node: Node) -> None:
        await prepare(node)
        slow_down(node, clock, 1e6)
        backing, find = node.backings[-1], node.backings[-1].find

        def vanished(key: bytes, part: int, orders: Any) -> int | None:
            return None if part >> 28 and node.movement.filling() else find(key, part, orders)

        backing.find = vanished  # type: ignore[method-assign]
        sizes = backing.sizes
        backing.sizes = lambda key, part: [sizes(key, part)[0], 4096.0, 4096.0]  # type: ignore[method-assign]
        assert (await load(node))[1] == [chunk(number) for number in range(3)]

    on_real_node(test, options, clock)


def test_a_tier_that_hangs_strands_nobody(options: dict[str, Any]) -> None:
    clock = ManualClock()
    options["deadlines.load"] = "100ms"

    async def test(node: Node) -> None:
        await prepare(node)
        tier, gate = node.backings[-1].tier, threading.Event()
        read = tier.read

        def hang(ids: Any, into: Any) -> Any:
            gate.wait(30)
            return read(ids, into)

        tier.read = hang  # type: ignore[method-assign]
        request = p.Match(1, b"".join(KEYS), [0], [VEC, "portable"], [NBYTES])
        matched = at_once(node.match(ME, request))
        await asyncio.sleep(0.05)
        clock.advance(1.0)
        assert (await arrive(node, ME, matched.lease, 0)).failed
        node.release(ME, p.Release(matched.lease))
        gate.set()
        await until(lambda: not node.movement.filling() and not node.movement.arriving)

    on_real_node(test, options, clock)


def test_a_link_that_dies_ends_the_load_early(options: dict[str, Any]) -> None:
    """What came can be used, and the engine computes the rest."""
    clock = ManualClock()

    async def test(node: Node) -> None:
        await prepare(node)
        link = slow_down(node, clock, 100e6)

        def sleep(seconds: float) -> None:
            clock.advance(seconds)
            node.backings[-1].bandwidth = Believed(1e4)

        link._sleep = sleep
        request = p.Match(1, b"".join(KEYS), [0], [VEC, "portable"], [NBYTES])
        matched = at_once(node.match(ME, request))
        arrived = await arrive(node, ME, matched.lease, 0)
        while not arrived.failed and arrived.ready < 3:
            arrived = await arrive(node, ME, matched.lease, arrived.ready)
        assert arrived.ready == 1
        assert levels(node) == {"0": 1, "given up": 2}
        node.release(ME, p.Release(matched.lease))
        assert store(node) == 0, "it is all still there"

    on_real_node(test, options, clock)


def test_without_a_target_all_is_read_as_it_was_stored(options: dict[str, Any]) -> None:
    clock = ManualClock()
    del options["disk.coarser"], options["disk.load_target"]

    async def test(node: Node) -> None:
        await prepare(node)
        slow_down(node, clock, 1e3)
        assert (await load(node))[1] == [chunk(number) for number in range(3)]
        assert levels(node) == {}

    on_real_node(test, options, clock)


def test_copies_are_found_after_a_restart_and_go_with_their_chunk(options: dict[str, Any]) -> None:
    before: dict[str, int] = {}

    async def first(node: Node) -> None:
        await prepare(node)
        before.update(used(node))
        assert owned(node).index.num_objects == 9

    async def second(node: Node) -> None:
        backing = owned(node)
        await timed(node)
        assert (await load(node))[0] == [1, 1, 1]
        assert backing.index.num_objects == 9
        assert used(node) == before
        await clear(node, ME, [KEYS[0]])
        assert backing.index.num_objects == 6
        await clear(node, ME)
        assert used(node) == {"disk": 0}

    on_real_node(first, options)
    on_real_node(second, options)


def test_a_restored_copy_is_the_object_that_was_asked_for(options: dict[str, Any]) -> None:
    clock = ManualClock()

    async def test(node: Node) -> None:
        await prepare(node)
        slow_down(node, clock, 1e6)
        node.reservations._costs[stored_bytes(NBYTES)] = 1e9
        request = p.Match(1, b"".join(KEYS), [0], [VEC, "portable"], [NBYTES])
        matched = at_once(node.match(ME, request))
        arrived = await arrive(node, ME, matched.lease, 2)
        assert levels(node) == {"2": 3}
        (last,) = offsets_of(arrived.offsets)
        header = decode(node.host.pool.view(last, HEADER_BYTES))
        assert (header.key, header.group, header.rank, header.codec) == (KEYS[2], 0, 0, "raw")
        node.release(ME, p.Release(matched.lease))

    on_real_node(test, options, clock)


def test_coarser_copies_need_a_target(options: dict[str, Any]) -> None:
    async def test(node: Node) -> None:
        pass

    del options["disk.load_target"]
    with pytest.raises(ConfigError, match=r"disk.load_target: missing"):
        on_real_node(test, options)
