"""A tier in the node's service: one object at a time, nothing corrupt, and whose bytes count."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from typing import Any

import pytest
from tests.support.nodes import (
    ORDER,
    OTHER,
    RAW,
    SLOT,
    GatedTier,
    arrive,
    at_once,
    chunk_keys,
    clear,
    flush,
    load,
    make_backing,
    make_node,
    match,
    on_node,
    owned,
    release,
    store,
    until,
)
from tests.support.real_nodes import KEYS, NBYTES, VEC, chunk, on_real_node, used
from tests.support.real_nodes import ME as REAL_ME
from tests.support.real_nodes import load as load_real
from tests.support.real_nodes import store as store_real

from kvstrata.codecs.lossless import Lossless
from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.common.background import NICE, Tasks, Threads
from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.service import scrub as scrub_module
from kvstrata.node.service.calls import ENCODE_NICE
from kvstrata.node.service.uses import Uses
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES
from kvstrata.observe.counters import Counters
from kvstrata.parts import identity
from kvstrata.testing.clock import ManualClock
from kvstrata.tiers.base import Limits, Outcome
from kvstrata.tiers.faulty import Answer, FaultyTier, FlipBit, Raise
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p

ME, YOU = Client("pid 1"), Client("pid 2")


class Recorder(GatedTier):
    """Remembers what it was asked, in the order in which that began."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, bytes]] = []
        self.batches: list[int] = []

    def write(self, puts: Any) -> Any:
        self.asked += [("write", put.object_id[:32]) for put in puts]
        return super().write(puts)

    def delete(self, ids: Any, versions: Any = None) -> Any:
        self.asked += [("delete", one[:32]) for one in ids]
        self.batches.append(len(ids))
        return super().delete(ids, versions)


class TestOneObjectAtATime:
    def test_two_writes(self) -> None:
        tier = Recorder()

        async def test(node: Node) -> None:
            (key,), (other,) = chunk_keys(1), chunk_keys(1, 1)
            tier.shut("write")
            store(node, ME, [key])
            await until(lambda: tier.waiting == 1)
            # The same chunk in another order and of another size, and one that it is not.
            store(node, YOU, [key], order=OTHER, nbytes=2 * RAW)
            store(node, ME, [other])
            await until(lambda: tier.waiting == 2)
            assert tier.asked == [("write", key), ("write", other)]
            tier.open()
            await flush(node, ME)
            assert tier.asked[2:] == [("write", key)]
            assert owned(node).find(key, 0, [OTHER]) == 3 * 4096 + 4096
            node.check_integrity(contents=True)

        on_node(test, tier=tier, num_threads=3)

    def test_a_deletion_and_a_fresh_copy(self) -> None:
        tier = Recorder()

        async def test(node: Node) -> None:
            (key,) = chunk_keys(1)
            store(node, ME, [key])
            await flush(node, ME)
            tier.shut("delete")
            clearing = asyncio.ensure_future(clear(node, ME, [key]))
            await until(lambda: tier.waiting == 1)
            store(node, ME, [key])
            store(node, ME, chunk_keys(1, 1))
            await until(lambda: chunk_keys(1, 1)[0] in owned(node).index)
            assert key not in owned(node).index
            tier.open()
            await clearing
            await flush(node, ME)
            verbs = [verb for verb, one in tier.asked if one == key]
            assert verbs == ["write", "delete", "write"]
            node.check_integrity(contents=True)
            await clear(node, ME, tiers=["host"])
            assert await load(node, ME, [key]) == 1

        on_node(test, tier=tier, num_threads=3)

    def test_a_clear_and_a_fresh_copy(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            (key,) = chunk_keys(1)
            store(node, ME, [key])
            await flush(node, ME)
            tier.shut("clear")
            clearing = asyncio.ensure_future(clear(node, ME))
            await until(lambda: tier.waiting == 1)
            store(node, ME, [key])
            for _ in range(50):
                await asyncio.sleep(0)
            tier.open()
            await clearing
            await flush(node, ME)
            await clear(node, ME, tiers=["host"])
            assert await load(node, ME, [key]) == 1

        on_node(test, tier=tier)

    def test_a_deletion_is_answered_when_a_write_it_overtook_has_gone_too(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            (key,) = chunk_keys(1)
            tier.shut("write")
            store(node, ME, [key])
            await until(lambda: tier.waiting == 1)
            clearing = asyncio.ensure_future(clear(node, ME, [key]))
            for _ in range(50):
                await asyncio.sleep(0)
            assert not clearing.done()
            tier.open()
            await clearing
            assert tier.held == 0

        on_node(test, tier=tier)

    @pytest.mark.parametrize(
        "fault",
        [
            FlipBit(8 * 5000),
            FlipBit(8 * 8),  # of a later release
            Answer(Outcome.FAILED),
            Answer(Outcome.MISS),
        ],
    )
    def test_a_late_read_does_not_condemn_what_has_taken_its_place(self, fault: Any) -> None:
        inner = GatedTier()
        tier = FaultyTier(inner)

        class Late(FaultyTier):
            """What a read found is known at once, and said late."""

            def read(self, ids: Any, into: Any) -> Any:
                answers = super().read(ids, into)
                inner._pass("delete")
                return answers

        tier = Late(inner)

        async def test(node: Node) -> None:
            (key,) = chunk_keys(1)
            store(node, ME, [key])
            await flush(node, ME)
            await clear(node, ME, tiers=["host"])
            tier.inject("read", fault, times=1)
            inner.shut("delete")
            matched = match(node, ME, [key])
            await until(lambda: inner.waiting == 1)
            # Stored anew meanwhile, as many bytes, in another order.
            assert store(node, YOU, [key], order=OTHER) == 1
            await flush(node, YOU)
            inner.open()
            assert (await arrive(node, ME, matched.lease)).failed
            release(node, ME, matched.lease)
            await until(lambda: not len(owned(node)._turns))
            assert owned(node).find(key, 0, [OTHER]) == SLOT
            assert inner.held == SLOT

        on_node(test, tier=tier)

    def test_two_that_make_room_for_each_other_do_not_wait_for_ever(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            for prompt in range(2):
                store(node, ME, chunk_keys(1, prompt))
            await flush(node, ME)
            tier.shut("write")
            # Each is written again, so there is room for neither before the other has gone.
            for prompt in range(2):
                store(node, YOU, chunk_keys(1, prompt), order=OTHER)
            tier.open()
            await asyncio.wait_for(flush(node, ME), 10)
            node.check_integrity(contents=True)
            assert tier.most <= 2 * SLOT

        on_node(test, tier=tier, tier_slots=2)

    def test_a_failed_write_leaves_no_entry_of_what_it_may_have_replaced(self) -> None:
        clock, inner = ManualClock(), GatedTier()
        tier = FaultyTier(inner)

        async def test(node: Node) -> None:
            (key,) = chunk_keys(1)
            store(node, ME, [key])
            await flush(node, ME)
            tier.inject("write", Answer(Outcome.FAILED), times=1)
            store(node, YOU, [key], order=OTHER)
            await flush(node, YOU)
            assert key not in owned(node).index
            node.check_integrity(contents=True)
            await owned(node).upkeep()
            assert inner.held == owned(node).index.used_bytes == 0

        on_node(test, tier=tier, clock=clock)


class TestBytesThatCount:
    def test_a_fresh_copy_takes_the_place_of_what_could_not_be_deleted(self) -> None:
        clock, inner = ManualClock(), GatedTier()
        tier = FaultyTier(inner)

        async def test(node: Node) -> None:
            (key,), backing = chunk_keys(1), owned(node)
            store(node, ME, [key])
            await flush(node, ME)
            tier.inject("delete", Answer(Outcome.FAILED), times=1)
            with pytest.raises(Exception, match="not all of it"):
                await clear(node, ME, [key])
            assert backing.index.claimed_bytes == SLOT
            clock.advance(100.0)
            store(node, ME, [key])
            await flush(node, ME)
            assert (backing.index.claimed_bytes, backing.index.used_bytes) == (0, SLOT)
            await backing.upkeep()
            assert inner.held == SLOT, "the fresh copy was deleted for the old one"

        on_node(test, tier=tier, clock=clock)

    def test_what_could_not_be_deleted_is_tried_again_without_a_write(self) -> None:
        clock, inner = ManualClock(), GatedTier()
        tier = FaultyTier(inner)

        async def test(node: Node) -> None:
            store(node, ME, chunk_keys(3))
            await flush(node, ME)
            tier.inject("clear", Raise(TierFull("no room for a number")), times=1)
            with pytest.raises(Exception, match="may be there again after a restart: no room"):
                await clear(node, ME)
            clock.advance(100.0)
            await owned(node).upkeep()
            assert inner.held == owned(node).index.used_bytes == 0

        on_node(test, tier=tier, clock=clock)

    def test_a_tier_that_is_off_is_not_asked_to_delete(self) -> None:
        clock, inner = ManualClock(), Recorder()
        tier = FaultyTier(inner)

        async def test(node: Node) -> None:
            (key,), backing = chunk_keys(1), owned(node)
            store(node, ME, [key])
            await flush(node, ME)
            tier.inject("delete", Raise(TierUnavailable("no route")), times=1)
            with pytest.raises(Exception, match="no route"):
                await clear(node, ME, [key])
            await backing.upkeep()
            assert not inner.batches
            clock.advance(100.0)
            await backing.upkeep()
            assert inner.batches == [1]

        on_node(test, tier=tier, clock=clock)

    def test_laws_are_laws(self) -> None:
        async def test(node: Node) -> None:
            (key,), backing = chunk_keys(1), owned(node)
            store(node, ME, [key])
            await flush(node, ME)
            assert backing.index.claim(4096)
            with pytest.raises(AssertionError, match="4096 bytes claimed, but 0 doomed"):
                node.check_integrity()
            backing.index.unclaim(4096)
            backing.index.pop(key, 0, Cause.LOST)
            node.check_integrity()
            with pytest.raises(AssertionError, match="in the tier and nowhere else"):
                node.check_integrity(contents=True)
            backing.tier.clear()

        on_node(test, tier=MemoryTier())

    def test_a_gone_slot_is_not_written(self) -> None:
        tier = Recorder()

        async def test(node: Node) -> None:
            (first,), (key,) = chunk_keys(1), chunk_keys(1, 1)
            tier.shut("write")
            store(node, ME, [first])
            await until(lambda: tier.waiting == 1)
            store(node, ME, [key])
            store(node, YOU, [key], order=OTHER)  # replaces the slot of the one before
            tier.open()
            await flush(node, ME)
            assert tier.asked == [("write", first), ("write", key)]
            assert owned(node).find(key, 0, [OTHER]) is not None

        on_node(test, tier=tier, num_threads=1)

    def test_room_that_is_being_made_is_waited_for(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            store(node, ME, chunk_keys(2))
            await flush(node, ME)
            tier.shut("delete")
            clearing = asyncio.ensure_future(clear(node, ME, chunk_keys(2)))
            await until(lambda: tier.waiting == 1)
            # All that is there is on its way out already; there is nothing to evict.
            store(node, ME, chunk_keys(1, 1))
            for _ in range(50):
                await asyncio.sleep(0)
            tier.open()
            await clearing
            await flush(node, ME)
            assert list(owned(node).index.keys()) == chunk_keys(1, 1)
            assert tier.most <= 2 * SLOT

        on_node(test, tier=tier, tier_slots=2)


class TestLimits:
    def test_deletions_come_in_batches(self) -> None:
        class Small(Recorder):
            limits = Limits(batch_objects=3)

        tier = Small()

        async def test(node: Node) -> None:
            store(node, ME, chunk_keys(8))
            await flush(node, ME)
            assert await clear(node, ME, chunk_keys(8), ["memory"]) == 8
            assert sorted(tier.batches) == [2, 3, 3]

        on_node(test, tier=tier)

    def test_what_is_too_large_is_not_stored(self) -> None:
        class Small(MemoryTier):
            limits = Limits(batch_bytes=SLOT)

        async def test(node: Node) -> None:
            store(node, ME, chunk_keys(1))
            store(node, ME, chunk_keys(1, 1), nbytes=2 * RAW)
            await flush(node, ME)
            assert list(owned(node).index.keys()) == chunk_keys(1)

        on_node(test, tier=Small())

    def test_no_more_calls_at_once_than_it_bears(self) -> None:
        class Narrow(GatedTier):
            limits = Limits(concurrency=4)

        backing = make_backing(Narrow(), num_threads=8)
        assert backing.num_threads == 2
        backing.close()


class TestCorruption:
    @pytest.mark.parametrize("codec", ["lossless", "fp8", "int8", "cachegen-2"])
    def test_what_rots_in_host_memory_is_never_encoded(self, codec: str) -> None:
        async def test(node: Node) -> None:
            assert store_real(node) == 3
            slot = node.host.get(KEYS[1], 0)
            assert slot is not None
            node.host.pool.view(slot.offset + HEADER_BYTES + 4321, 1)[0] ^= 1
            await flush(node, REAL_ME)
            assert node.counters.get("corrupt_objects_total", tier="host") == 1
            assert node.host.get(KEYS[1], 0) is None
            assert owned(node).find(KEYS[1], 0, None) is None
            assert owned(node).index.num_objects == 2
            await clear(node, REAL_ME, tiers=["host"])
            assert (await load_real(node))[0] == [1]
            assert store_real(node) == 1
            await flush(node, REAL_ME)
            assert owned(node).index.num_objects == 3

        on_real_node(test, {"memory.capacity": "8MiB", "memory.codec": codec})

    @pytest.mark.parametrize("byte", [9, 40, 500])
    @pytest.mark.parametrize("codec", ["raw", "int8"])
    def test_a_damaged_header_is_not_written(self, codec: str, byte: int) -> None:
        async def test(node: Node) -> None:
            store_real(node)
            slot = node.host.get(KEYS[2], 0)
            assert slot is not None
            node.host.pool.view(slot.offset + byte, 1)[0] ^= 0x40
            await flush(node, REAL_ME)
            assert node.counters.get("corrupt_objects_total", tier="host") == 1
            assert node.host.get(KEYS[2], 0) is None
            assert owned(node).index.num_objects == 2
            assert owned(node).state == "ok"

        on_real_node(test, {"memory.capacity": "8MiB", "memory.codec": codec})

    def test_what_rots_before_it_is_written_as_it_is_takes_its_checksum_along(self) -> None:
        async def test(node: Node) -> None:
            store_real(node)
            slot = node.host.get(KEYS[1], 0)
            assert slot is not None
            node.host.pool.view(slot.offset + HEADER_BYTES + 4321, 1)[0] ^= 1
            await flush(node, REAL_ME)
            await clear(node, REAL_ME, tiers=["host"])
            wanted = p.Match(1, b"".join(KEYS), [0], [VEC], [NBYTES])
            matched = at_once(node.match(REAL_ME, wanted))
            arrived = await arrive(node, REAL_ME, matched.lease, 1)
            assert (arrived.ready, arrived.failed) == (1, True)
            release(node, REAL_ME, matched.lease)
            assert node.counters.get("corrupt_objects_total", tier="memory") == 1
            assert (await load_real(node, 1))[1] == [chunk(0)]

        on_real_node(test, {"memory.capacity": "8MiB", "memory.codec": "raw"})

    def test_only_the_damaged_slot_is_dropped(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            (first,), (key,) = chunk_keys(1), chunk_keys(1, 1)
            tier.shut("write")
            store(node, ME, [first])
            await until(lambda: tier.waiting == 1)
            store(node, ME, [key])
            slot = node.host.get(key, 0)
            assert slot is not None
            node.host.pool.view(slot.offset + 40, 1)[0] ^= 1
            encoded = node.movement.behind[0].backing.write

            async def replaced_meanwhile(*arguments: Any) -> bool:
                store(node, YOU, [key], order=OTHER)
                return await encoded(*arguments)

            owned(node).write = replaced_meanwhile  # type: ignore[method-assign,assignment]
            tier.open()
            await until(lambda: node.counters.get("corrupt_objects_total", tier="host") == 1)
            fresh = node.host.get(key, 0)
            assert fresh is not None
            assert fresh.order == OTHER
            del owned(node).write
            await flush(node, ME)

        on_node(test, tier=tier, num_threads=1)


def test_what_has_taken_its_place_is_not_removed() -> None:
    """A move takes away what it has copied, and nothing else."""

    async def test(node: Node) -> None:
        backing, (key,) = owned(node), chunk_keys(1)
        store(node, ME, [key])
        await flush(node, ME)
        copied = backing.seen(key, 0)
        await clear(node, ME)
        store(node, ME, [key])
        await flush(node, ME)
        assert not await backing.remove(key, 0, copied, Cause.MOVED)
        assert key in backing.index
        assert await backing.remove(key, 0, backing.seen(key, 0), Cause.MOVED)
        assert key not in backing.index

    on_node(test, tier=MemoryTier())


class TestScrub:
    def test_it_goes_round_and_round(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tier = MemoryTier()
        monkeypatch.setattr(scrub_module, "IDLE_S", 0.0)

        async def test(node: Node) -> None:
            backing, keys = owned(node), chunk_keys(3)
            store(node, ME, keys)
            await flush(node, ME)
            for number, key in enumerate(keys, 1):
                tier._objects[identity(key, 0)].data[6000] ^= 1
                await until(
                    lambda n=number: node.counters.get("corrupt_objects_total", tier="memory") == n  # type: ignore[misc]
                )
                await until(lambda key=key: key not in backing.index)  # type: ignore[misc]
            assert node.counters.get("tier_reads_total", tier="memory", outcome="hit") > 0

        on_node(test, tier=tier, scrub_bytes_per_s=1e12)

    def test_a_rate_of_zero_is_never_until_it_changes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scrub_module, "IDLE_S", 0.001)

        async def test(node: Node) -> None:
            store(node, ME, chunk_keys(1))
            await flush(node, ME)
            await asyncio.sleep(0.05)
            assert not node.counters.get("tier_reads_total", tier="memory", outcome="hit")
            owned(node).scrub_bytes_per_s = 1e12
            await until(
                lambda: node.counters.get("tier_reads_total", tier="memory", outcome="hit") > 0
            )

        on_node(test, tier=MemoryTier())

    def test_encoded_objects_in_memory_have_a_rate_of_their_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No disk is needed for it."""
        monkeypatch.setattr(scrub_module, "IDLE_S", 0.0)

        async def test(node: Node) -> None:
            store_real(node)
            await flush(node, REAL_ME)
            tier = owned(node).tier
            assert isinstance(tier, MemoryTier)
            tier._objects[identity(KEYS[1], 0)].data[6000] ^= 1
            await until(lambda: node.counters.get("corrupt_objects_total", tier="memory") == 1)
            await until(lambda: used(node)["memory"] == tier_bytes(tier))

        def tier_bytes(tier: MemoryTier) -> int:
            return sum(len(one.data) for one in tier._objects.values())

        on_real_node(test, {"memory.capacity": "8MiB", "memory.scrub_rate": "1GiB/s"})


class TestPriority:
    def test_what_may_take_its_time_yields_and_a_read_does_not(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nice: dict[str, int] = {}
        encode = Lossless.encode_layer
        here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        def note(what: str) -> None:
            nice[what] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        def noted(*arguments: Any) -> Any:
            note("encode")
            return encode(*arguments)

        class Noting(MemoryTier):
            def write(self, puts: Any) -> Any:
                note("write")
                return super().write(puts)

            def read(self, ids: Any, into: Any) -> Any:
                note("read")
                return super().read(ids, into)

        async def test(node: Node) -> None:
            backing, keys = owned(node), chunk_keys(1)
            store(node, ME, keys)
            await flush(node, ME)
            await clear(node, ME, tiers=["host"])
            assert await load(node, ME, keys) == 1
            assert nice == {
                "encode": min(here + ENCODE_NICE, 19), "write": min(here + NICE, 19), "read": here,
            }  # fmt: skip
            size = backing.find(keys[0], 0, None)
            assert size is not None
            await backing.verify(keys[0], 0, size)
            assert nice["read"] == min(here + NICE, 19), "nobody waits for the scrub"

        monkeypatch.setattr(Lossless, "encode_layer", noted)
        on_node(test, tier=Noting(), codec="lossless")

    def test_threads_yield_to_whoever_starts_them(self) -> None:
        def nice() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        def niced() -> tuple[int, int]:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(nice() + 3, 19))
            threads = Threads(1, "test", nice=NICE)
            there = threads.submit(nice).result(10)
            threads.close()
            return nice(), there

        outer = Threads(1, "test")
        mine, theirs = outer.submit(niced).result(10)
        outer.close()
        assert theirs == min(mine + NICE, 19)

    def test_where_no_thread_may_yield_all_work_all_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: int) -> None:
            raise PermissionError(errno.EPERM, "not in this sandbox")

        monkeypatch.setattr(os, "setpriority", refuse)
        threads = Threads(1, "test", nice=NICE)
        assert threads.submit(lambda: 7).result(10) == 7
        threads.close()

    def test_threads_are_used_again(self) -> None:
        threads = Threads(8, "test")
        used = set()
        for _ in range(50):
            used.add(threads.submit(threading.get_ident).result(10))
            deadline = time.monotonic() + 10
            while not threads._idle:  # it has answered, and is about to wait for more
                assert time.monotonic() < deadline
        assert len(used) == 1
        threads.close()


@pytest.mark.bugs
def test_a_task_that_dies_of_a_bug_is_heard_of_and_one_that_is_called_off_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken() -> None:
        raise ZeroDivisionError("oops")

    async def endless() -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        counters = Counters()
        tasks = Tasks(counters)
        tasks.spawn("a wait", endless())
        for _ in range(2):
            await tasks.cancel()
            assert len(tasks) == 0
        tasks.spawn("a walk", broken())
        await tasks.wait(10)
        assert counters.snapshot() == {'bugs_total{where="a walk"}': 1}

    asyncio.run(test())
    assert [record.message for record in caplog.records] == ["a walk died of a bug"]
    assert "ZeroDivisionError: oops" in caplog.text


class TestScratch:
    def test_what_is_idle_is_handed_back(self) -> None:
        scratch = Scratch(4)
        buffers = [scratch.take(4096 * n) for n in (1, 2, 3)]
        assert scratch.nbytes == 6 * 4096
        for buffer in buffers:
            scratch.give(buffer)
        scratch.trim()
        assert scratch.nbytes == 6 * 4096, "they were in use a moment ago"
        scratch.give(scratch.take(3 * 4096))
        scratch.trim()
        assert scratch.nbytes == 3 * 4096, "one was enough"
        scratch.trim()
        assert scratch.nbytes == 0

    def test_no_more_are_kept_than_said(self) -> None:
        scratch = Scratch(2)
        for buffer in [scratch.take(4096 * n) for n in (3, 1, 2)]:
            scratch.give(buffer)
        assert scratch.nbytes == 5 * 4096

    def test_a_node_at_rest_keeps_none(self) -> None:
        async def test(node: Node) -> None:
            backing = owned(node)
            store(node, ME, chunk_keys(4))
            await flush(node, ME)
            (state,) = node.status(ME, p.Status(1)).state["tiers"]
            assert state["scratch_bytes"] == backing.scratch_bytes > 0
            for _ in range(2):
                await backing.upkeep()
            assert backing.scratch_bytes == 0

        on_node(test, tier=MemoryTier(), codec="lossless")


class TestUses:
    def test_the_last_use_comes_last_and_tails_before_heads(self) -> None:
        async def test() -> None:
            uses = Uses()
            for prefix in (b"abc", b"axy", b"ab"):
                uses.note([bytes([one]) for one in prefix])
            assert b"".join(await uses.take()) == b"cyxba"
            assert not await uses.take()

        asyncio.run(test())

    def test_there_are_only_so_many(self) -> None:
        async def test() -> None:
            uses = Uses()
            for prompt in range(40):
                uses.note(
                    chunk_keys(10_000, prompt)[:10_000] if prompt in (0, 39) else [b"x"] * 10_000
                )
            assert uses._num_keys <= 1 << 18
            taken = await uses.take()
            assert taken[-1] == chunk_keys(1, 39)[0]
            assert chunk_keys(1)[0] not in taken

        asyncio.run(test())


def test_a_node_without_tiers_is_checked_too() -> None:
    async def test() -> None:
        node = make_node()
        node.check_integrity(contents=True)
        node.host.close()

    asyncio.run(test())


def test_orders_are_learnt_from_what_is_read() -> None:
    tier = MemoryTier()

    async def test(node: Node) -> None:
        keys, backing = chunk_keys(1), owned(node)
        store(node, ME, keys)
        await flush(node, ME)
        again = make_backing(tier)
        await again.run()
        assert again.find(keys[0], 0, [OTHER]) == SLOT
        view = node.host.pool.view(node.host.get(keys[0], 0).offset, SLOT)  # type: ignore[union-attr]
        assert await again.read(keys[0], 0, SLOT, view) is not None
        assert again.find(keys[0], 0, [OTHER]) is None
        assert again.find(keys[0], 0, [ORDER]) == SLOT
        assert backing.find(keys[0], 0, [ORDER]) == SLOT

    on_node(test, tier=tier)
