"""A tier that hangs, whatever it is asked: it is left alone, and nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from tests.support.nodes import (
    SLOT,
    GatedTier,
    chunk_keys,
    clear,
    flush,
    load,
    make_node,
    on_node,
    owned,
    store,
    until,
)

from kvstrata.codecs.lossless import Lossless
from kvstrata.errors import TierUnavailable
from kvstrata.node.coding.recoding import warm_up
from kvstrata.node.node import Node
from kvstrata.node.service import calls
from kvstrata.node.slots.clients import Client
from kvstrata.testing.clock import ManualClock
from kvstrata.tiers.base import Limits
from kvstrata.tiers.memory import MemoryTier

ME = Client("pid 1")
DEADLINE_S = 0.02


def on_hanging_node(test: Any, tier: GatedTier, clock: ManualClock, **options: Any) -> None:
    on_node(test, tier=tier, clock=clock, deadline_s=DEADLINE_S, **options)


async def works_again(node: Node, tier: GatedTier, clock: ManualClock) -> None:
    """Once the tier does, it is filled and read as if nothing had been."""
    tier.open()
    await until(lambda: not node.movement.queued_bytes and not len(owned(node)._turns))
    clock.advance(100.0)
    await until(lambda: owned(node).state == "ok")
    keys = chunk_keys(2, 99)
    store(node, ME, keys)
    await flush(node, ME)
    await clear(node, ME, tiers=["host"])
    assert await load(node, ME, keys) == 2
    await owned(node).upkeep()
    assert owned(node).index.claimed_bytes == 0


def test_a_write() -> None:
    clock, tier = ManualClock(), GatedTier()

    async def test(node: Node) -> None:
        keys, backing = chunk_keys(6), owned(node)
        tier.shut("write")
        store(node, ME, keys)
        await until(lambda: tier.waiting == 2)
        flushing = asyncio.ensure_future(flush(node, ME))
        clock.advance(1.0)
        await flushing
        assert backing.state == "off: no write has ended for 0.02 s"
        # What a thread may still read stays where it is and counts; all else is let go.
        held = [key for key in keys if node.host.get(key, 0).holds]  # type: ignore[union-attr]
        assert held == keys[4:]
        assert node.movement.queued_bytes == backing.index.claimed_bytes == 2 * SLOT
        node.check_integrity()
        store(node, ME, chunk_keys(1, 1))
        assert node.counters.get("write_behind_skipped_total", tier="memory", why="tier") == 1
        await flush(node, ME)
        # Later it is read again, but not written to: no thread is left for that.
        clock.advance(1.0)
        assert backing.readable
        assert backing.state == "read only: no write has ended for 0.02 s"
        store(node, ME, chunk_keys(1, 2))
        assert node.counters.get("write_behind_skipped_total", tier="memory", why="tier") == 2
        await works_again(node, tier, clock)
        assert [key in backing.index for key in keys] == [False] * 4 + [True] * 2
        assert node.counters.get("tier_trips_total", tier="memory") == 1

    on_hanging_node(test, tier, clock)


def test_one_write_of_many() -> None:
    clock, stuck = ManualClock(), threading.Event()

    class Sticky(GatedTier):
        def write(self, puts: Any) -> Any:
            if puts[0].object_id[:32] == chunk_keys(1)[0]:
                assert stuck.wait(30)
            return super().write(puts)

    async def test(node: Node) -> None:
        backing = owned(node)
        store(node, ME, chunk_keys(1))
        await until(lambda: backing.index.claimed_bytes == SLOT)
        clock.advance(1.0)
        await flush(node, ME)
        assert backing.state.startswith("off")
        # However long that one takes, the others go on in the other thread.
        clock.advance(100.0)
        store(node, ME, chunk_keys(3, 1))
        await flush(node, ME)
        assert all(key in backing.index for key in chunk_keys(3, 1))
        # Of the object that hangs nobody can say anything.
        with pytest.raises(TierUnavailable, match="may be there again after a restart"):
            await clear(node, ME, chunk_keys(1))
        await clear(node, ME, chunk_keys(1, 1))
        stuck.set()
        await until(lambda: not len(backing._turns))
        assert chunk_keys(1)[0] not in backing.index, "it was cleared before it was there"
        await until(lambda: backing.index.claimed_bytes == 0)

    on_hanging_node(test, Sticky(), clock)


def test_a_clear_while_writes_hang() -> None:
    clock, tier = ManualClock(), GatedTier()

    async def test(node: Node) -> None:
        tier.shut("write")
        store(node, ME, chunk_keys(4))
        await until(lambda: tier.waiting == 2)
        clock.advance(1.0)
        await flush(node, ME)
        clearing = asyncio.ensure_future(clear(node, ME))
        while not clearing.done():
            clock.advance(1.0)
            await asyncio.sleep(0.001)
        with pytest.raises(TierUnavailable, match="no clear has ended"):
            await clearing
        await works_again(node, tier, clock)
        assert set(owned(node).index.keys()) == set(chunk_keys(2, 99))

    on_hanging_node(test, tier, clock)


def test_a_deletion() -> None:
    clock, tier = ManualClock(), GatedTier()

    async def test(node: Node) -> None:
        backing = owned(node)
        store(node, ME, chunk_keys(3))
        await flush(node, ME)
        tier.shut("delete")
        (new,) = chunk_keys(1, 1)
        store(node, ME, [new])
        await until(lambda: tier.waiting == 1)
        flushing = asyncio.ensure_future(flush(node, ME))
        clock.advance(1.0)
        await flushing
        assert backing.state == "off: no deletion has ended for 0.02 s"
        # It was to make room: nobody reads the new object, and what makes room still counts.
        await until(lambda: not node.host.get(new, 0).holds)  # type: ignore[union-attr]
        assert node.movement.queued_bytes == 0
        assert backing.index.claimed_bytes == SLOT
        assert backing.index.used_bytes == tier.held == 3 * SLOT
        node.check_integrity()
        clearing = asyncio.ensure_future(clear(node, ME, chunk_keys(3)))
        await until(lambda: tier.waiting == 2)
        clock.advance(1.0)
        with pytest.raises(TierUnavailable, match="not all of it could be deleted"):
            await clearing
        await works_again(node, tier, clock)

    on_hanging_node(test, tier, clock, tier_slots=3)


def test_a_clear() -> None:
    clock, tier = ManualClock(), GatedTier()

    async def test(node: Node) -> None:
        backing = owned(node)
        store(node, ME, chunk_keys(3))
        await flush(node, ME)
        tier.shut("clear")
        clearing = asyncio.ensure_future(clear(node, ME))
        await until(lambda: tier.waiting == 1)
        # What is stored meanwhile waits for it, or it would be struck.
        store(node, ME, chunk_keys(2, 1))
        flushing = asyncio.ensure_future(flush(node, ME))
        clock.advance(1.0)
        with pytest.raises(TierUnavailable, match=r"after a restart: no clear has ended"):
            await clearing
        await flushing
        assert backing.state == "off: no clear has ended for 0.02 s"
        assert backing.index.num_objects == 0
        assert backing.index.used_bytes == tier.held == 3 * SLOT
        node.check_integrity()
        await works_again(node, tier, clock)
        assert tier.held == 2 * SLOT

    on_hanging_node(test, tier, clock)


def test_a_note_of_use() -> None:
    clock, tier = ManualClock(), GatedTier()

    async def test(node: Node) -> None:
        backing = owned(node)
        store(node, ME, chunk_keys(3))
        await flush(node, ME)
        await load(node, ME, chunk_keys(3))
        tier.shut("touch")
        noting = asyncio.ensure_future(backing.upkeep())
        await until(lambda: tier.waiting == 1)
        clock.advance(1.0)
        await until(lambda: backing.state == "off: no note of use has ended for 0.02 s")
        tier.open()
        await noting
        await works_again(node, tier, clock)

    on_hanging_node(test, tier, clock)


def test_a_scan() -> None:
    clock, tier = ManualClock(), GatedTier()
    tier.shut("scan")

    async def test(node: Node) -> None:
        backing = owned(node)
        store(node, ME, chunk_keys(3))
        flushing = asyncio.ensure_future(flush(node, ME))
        await until(lambda: tier.waiting == 1)
        clock.advance(1.0)
        await flushing
        assert backing.state == "off: no step of the scan has ended for 0.02 s"
        clock.advance(100.0)
        # Nobody knows what it holds, so it is not written to.
        assert backing.state == "read only: no step of the scan has ended for 0.02 s"
        store(node, ME, chunk_keys(3, 1))
        await flush(node, ME)
        assert tier.held == 0
        await works_again(node, tier, clock)

    on_hanging_node(test, tier, clock)


def test_a_check() -> None:
    clock, tier = ManualClock(), GatedTier()

    async def test(node: Node) -> None:
        backing, (key,) = owned(node), chunk_keys(1)
        store(node, ME, [key])
        await flush(node, ME)
        tier.shut("read")
        checking = asyncio.ensure_future(backing.verify(key, 0, SLOT))
        await until(lambda: tier.waiting == 1)
        clock.advance(1.0)
        await until(lambda: backing.state == "off: no check has ended for 0.02 s")
        tier.open()
        await checking
        await works_again(node, tier, clock)

    on_hanging_node(test, tier, clock)


def test_a_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tier, gate, waiting = ManualClock(), GatedTier(), threading.Event(), []
    encode = Lossless.encode_layer

    def hang(*arguments: Any) -> Any:
        waiting.append(arguments)
        assert gate.wait(30)
        return encode(*arguments)

    async def test(node: Node) -> None:
        keys, backing = chunk_keys(5), owned(node)
        monkeypatch.setattr(Lossless, "encode_layer", hang)
        store(node, ME, keys)
        await until(lambda: len(waiting) == 2)
        flushing = asyncio.ensure_future(flush(node, ME))
        clock.advance(1.0)
        await flushing
        assert backing.state == "off: no encoding has ended for 0.02 s"
        assert [node.host.get(key, 0).holds for key in keys] == [0, 0, 0, 1, 1]  # type: ignore[union-attr]
        gate.set()
        await works_again(node, tier, clock)

    warm_up(Lossless())  # threads that yield to all others take long to compile it
    monkeypatch.setattr(calls, "ENCODE_DEADLINE_S", 0.0)
    monkeypatch.setattr(calls, "half_the_cores", lambda: 2)
    on_hanging_node(test, tier, clock, codec="lossless")


@pytest.mark.parametrize(("half", "num_encodes"), [(1, 1), (2, 2), (8, 2)])
def test_encoding_takes_half_the_cores_and_no_more_threads_than_the_tier_has(
    monkeypatch: pytest.MonkeyPatch, half: int, num_encodes: int
) -> None:
    gate, begun = threading.Event(), []

    def work() -> None:
        begun.append(0)
        gate.wait()

    async def test() -> None:
        node = make_node()
        lanes = calls.TierCalls(
            "slow", 2, 1000.0, counters=node.counters, clock=ManualClock(), trip=print
        )
        ended = asyncio.gather(*[lanes.encode(work) for _ in range(4)])
        await until(lambda: len(begun) == num_encodes)
        await asyncio.sleep(0.05)
        assert len(begun) == num_encodes
        gate.set()
        await ended
        lanes.close()
        node.host.close()

    monkeypatch.setattr(calls, "half_the_cores", lambda: half)
    asyncio.run(test())


def test_a_codec_has_more_time_than_a_tier() -> None:
    clock, gate = ManualClock(), threading.Event()

    async def test() -> None:
        trips: list[TierUnavailable] = []
        node = make_node()
        lanes = calls.TierCalls(
            "slow", 1, DEADLINE_S, counters=node.counters, clock=clock, trip=trips.append
        )
        encoding = asyncio.ensure_future(lanes.encode(gate.wait))
        await asyncio.sleep(0)
        clock.advance(10.0)
        waiting = asyncio.gather(*[lanes.call("write", gate.wait) for _ in range(2)])
        await asyncio.sleep(0)
        clock.advance(1.0)
        with pytest.raises(TierUnavailable):
            await waiting
        assert [str(trip) for trip in trips] == ["no write has ended for 0.02 s"] * 2
        gate.set()
        assert await encoding
        lanes.close()
        node.host.close()

    asyncio.run(test())


def test_a_tier_may_promise_to_be_quicker() -> None:
    clock = ManualClock()

    class Prompt(GatedTier):
        limits = Limits(timeout_s=DEADLINE_S)

    tier = Prompt()

    async def test(node: Node) -> None:
        tier.shut("write")
        store(node, ME, chunk_keys(1))
        await until(lambda: tier.waiting == 1)
        clock.advance(1.0)
        await flush(node, ME)
        assert owned(node).state == "off: no write has ended for 0.02 s"
        tier.open()

    on_node(test, tier=tier, clock=clock, deadline_s=1000.0)


def test_a_tier_that_is_only_written_to_recovers_its_patience() -> None:
    clock = ManualClock()

    async def test(node: Node) -> None:
        backing = owned(node)
        for prompt in range(4):
            backing.trip(TierUnavailable("again"))
            assert backing._health.off_s == 1.0
            clock.advance(1.0)
            store(node, ME, chunk_keys(1, prompt))
            await flush(node, ME)

    on_node(test, tier=MemoryTier(), clock=clock)
