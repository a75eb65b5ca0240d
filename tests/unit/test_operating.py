"""An operator prefetches, transcodes, scrubs, inspects, lists, drains and reloads a real node."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    OTHER,
    RAW,
    SLOT,
    GatedTier,
    chunk_keys,
    clear,
    flush,
    match,
    on_node,
    owned,
    release,
    reserve,
    until,
)
from tests.support.nodes import load as load_small
from tests.support.nodes import store as store_small
from tests.support.nodes import write as write_small
from tests.support.real_nodes import (
    KEYS,
    ME,
    NBYTES,
    VEC,
    chunk,
    load,
    load_shared,
    on_real_node,
    store,
    stored_codec,
    used,
)
from tests.support.working import ask, begun, done, ended, packed

from kvstrata.config import load_config
from kvstrata.errors import Busy, ConfigError, UsageError
from kvstrata.header import NO_PARENT
from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.operating import draining, lineage
from kvstrata.node.operating.directory import Directory
from kvstrata.objects import HEADER_BYTES
from kvstrata.parts import identity
from kvstrata.testing.servers.redis import RedisServer, installed
from kvstrata.tiers.faulty import FaultyTier, FlipBit
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p

SHARED: dict[str, Any] = {"parts": [0], "orders": [VEC, "portable"], "namespace": NAMESPACE}


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    return {"disk.path": tmp_path / "disk", "disk.capacity": "8MiB"}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    if not installed():
        pytest.skip("there is no redis-server here")
    server = RedisServer(tmp_path / "redis")
    yield server
    server.close()


class TestPrefetch:
    def test_what_is_encoded_in_a_slower_tier(self, disk: dict[str, Any]) -> None:
        """Keys are enough: parts, orders and lengths are read off the first chunk."""

        async def test(node: Node) -> None:
            store(node)
            await flush(node, ME)
            await clear(node, ME, tiers=["host"])
            job = await done(node, o.Prefetch(1, packed()))
            assert (job.total, job.done) == (3, 3)
            assert len(node.leases) == 0
            assert await load(node) == ([0] * 3, [chunk(number) for number in range(3)])
            again = await done(node, o.Prefetch(1, packed()))
            assert (again.done, again.nbytes) == (3, 0)

        on_real_node(test, disk | {"disk.codec": "lossless"})

    def test_from_a_shared_store(self, redis: RedisServer) -> None:
        async def test(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            store(node)
            await flush(node, ME)
            await clear(node, ME, tiers=["host"])
            job = await ended(node, await begun(node, o.Prefetch(1, packed())))
            assert job.state == "failed"
            assert "name parts, orders, lengths and the namespace" in job.note
            await done(node, o.Prefetch(1, packed(), lengths=[NBYTES], **SHARED))
            assert await load(node) == ([0] * 3, [chunk(number) for number in range(3)])

        on_real_node(test, {"redis": {"url": redis.url}})

    def test_what_nobody_has_ends_it(self) -> None:
        keys = chunk_keys(5)

        async def test(node: Node) -> None:
            store_small(node, ME, keys[:3])
            job = await ended(node, await begun(node, o.Prefetch(1, packed(keys))))
            assert (job.state, job.done, job.total) == ("done", 3, 5)
            assert job.note == "nobody has the next chunk"

        on_node(test, tier=MemoryTier())

    def test_no_more_than_may_be_leased(self) -> None:
        """It takes a process's share of the pool, however much it is asked for."""
        keys = chunk_keys(16)

        async def test(node: Node) -> None:
            for first in range(0, 16, 4):
                store_small(node, ME, keys[: first + 4], first)
                await flush(node, ME)
            await clear(node, ME, tiers=["host"])
            job = await ended(node, await begun(node, o.Prefetch(1, packed(keys))))
            assert (job.done, job.note) == (5, "no room in host for more of it at once")
            assert len(node.leases) == node.leases.leased_bytes == 0
            matched = match(node, ME, keys[:5])
            assert matched.tiers == bytes(5)
            release(node, ME, matched.lease)

        on_node(test, tier=MemoryTier(), slots=10, per_client=0.5)

    def test_one_that_is_cancelled_lets_go(self) -> None:
        tier, keys = GatedTier(), chunk_keys(6)

        async def test(node: Node) -> None:
            store_small(node, ME, keys)
            await flush(node, ME)
            await clear(node, ME, tiers=["host"])
            number = await begun(node, o.Prefetch(1, packed(keys), [0], [ORDER], [RAW]))
            tier.shut("read")
            await until(lambda: tier.waiting > 0)
            assert len(node.leases) == 1
            await ask(node, o.Cancel(1, number))
            assert (await ended(node, number)).state == "cancelled"
            assert len(node.leases) == 0
            tier.open()

        on_node(test, tier=tier)


class TestTranscode:
    @pytest.mark.parametrize("keys", [None, packed()], ids=["all", "some"])
    def test_another_codec_in_the_same_tier(self, keys: bytes | None, disk: dict[str, Any]) -> None:
        async def test(node: Node) -> None:
            store(node)
            await flush(node, ME)
            raw = used(node)["disk"]
            job = await done(node, o.Transcode(1, "disk", "lossless", keys))
            assert (job.total, job.note) == (3, "")
            assert stored_codec(node)[0] == "lossless"
            assert used(node)["disk"] < 0.8 * raw
            again = await done(node, o.Transcode(1, "disk", "lossless", keys))
            assert (again.nbytes, again.note) == (0, "3 objects were stored so already")
            await clear(node, ME, tiers=["host"])
            assert await load(node) == ([1] * 3, [chunk(number) for number in range(3)])
            await done(node, o.Transcode(1, "disk", "", keys))
            assert (stored_codec(node)[0], used(node)["disk"]) == ("raw", raw)

        on_real_node(test, disk | {"disk.codec": "raw"})

    def test_lossy_once_and_never_twice(self, disk: dict[str, Any]) -> None:
        async def test(node: Node) -> None:
            store(node)
            await flush(node, ME)
            await done(node, o.Transcode(1, "disk", "int8"))
            once = stored_codec(node)
            assert once[0] == "quantized"
            job = await ended(node, await begun(node, o.Transcode(1, "disk", "int4")))
            assert job.failed == 3
            assert "so int4 may not have it" in job.troubles[0]
            assert stored_codec(node) == once
            await clear(node, ME, tiers=["host"])
            tiers, exact = await load(node)
            assert tiers == [1] * 3
            await clear(node, ME, tiers=["host"])
            await done(node, o.Transcode(1, "disk", "lossless"))
            assert (await load(node))[1] == exact, "as much as was left is kept, bit for bit"

        on_real_node(test, disk | {"disk.codec": "raw"})

    def test_in_a_shared_store_it_takes_the_place_of_what_was_there(
        self, redis: RedisServer
    ) -> None:
        async def test(node: Node) -> None:
            await until(lambda: node.backings[0]._timed)
            store(node)
            await flush(node, ME)
            with pytest.raises(UsageError, match="known only by asking: name the keys"):
                await ask(node, o.Transcode(1, "redis", "int8"))
            with contextlib.closing(redis.admin()) as admin:
                before: Any = admin.dbsize()
            await done(node, o.Transcode(1, "redis", "int8", packed(), **SHARED))
            with contextlib.closing(redis.admin()) as admin:
                assert admin.dbsize() == before, "what was there under another name has gone"
            await clear(node, ME, tiers=["host"])
            tiers, payloads = await load_shared(node)
            assert tiers == [1] * 3
            assert payloads[0] != chunk(0), "it went through int8"

        on_real_node(test, {"redis": {"url": redis.url, "lookup_timeout": "2s", "codec": "raw"}})

    def test_the_operators_bound_is_kept(self, disk: dict[str, Any]) -> None:
        async def test(node: Node) -> None:
            with pytest.raises(UsageError, match="int4 does not ask what it does to answers"):
                await ask(node, o.Transcode(1, "disk", "int4"))
            with pytest.raises(UsageError, match="no codec 'int5'"):
                await ask(node, o.Transcode(1, "disk", "int5"))

        on_real_node(test, disk | {"disk.codec": "raw", "quality": "agreement >= 99%"})


class TestScrub:
    @pytest.mark.parametrize("tier", ["host", "memory"])
    def test_finds_what_has_gone_bad(self, tier: str) -> None:
        keys = chunk_keys(9)
        inner = MemoryTier()
        faulty = FaultyTier(inner)

        async def test(node: Node) -> None:
            store_small(node, ME, keys)
            await flush(node, ME)
            clean = await done(node, o.Scrub(1, tier))
            assert (clean.done, clean.nbytes) == (9, 9 * SLOT)
            if tier == "host":
                slot = node.host.get(keys[4], 0)
                assert slot is not None
                node.host.pool.view(slot.offset + HEADER_BYTES, 1)[0] ^= 1
            else:
                faulty.inject("read", FlipBit(5000 * 8), when=lambda id: id == identity(keys[4], 0))
            job = await ended(node, await begun(node, o.Scrub(1, tier)))
            assert (job.state, job.failed) == ("done", 1)
            assert identity(keys[4], 0).hex() in job.troubles[0]
            index = node.host.index if tier == "host" else owned(node).index
            await until(lambda: keys[4] not in index)
            assert len(index) == 8
            await done(node, o.Scrub(1, tier))

        on_node(test, tier=faulty)

    @pytest.mark.parametrize("what", ["cleared", "replaced"])
    def test_what_goes_meanwhile_is_not_bad(self, what: str) -> None:
        tier, keys = GatedTier(), chunk_keys(1)

        async def test(node: Node) -> None:
            store_small(node, ME, keys)
            await flush(node, ME)
            tier.shut("read")
            scrub = await begun(node, o.Scrub(1, "memory"))
            await until(lambda: tier.waiting > 0)
            clearing: Awaitable[object] = asyncio.ensure_future(asyncio.sleep(0))
            if what == "cleared":
                clearing = asyncio.ensure_future(clear(node, ME, keys))
                await until(lambda: not len(owned(node).index))
            else:  # by a larger one, which is read in vain into the room of the one before
                store_small(node, ME, keys, order=OTHER, nbytes=2 * RAW)
                await until(lambda: owned(node).find(keys[0], 0, [OTHER]) is not None)
            tier.open()
            await clearing
            job = await ended(node, scrub)
            assert (job.state, job.failed, job.troubles) == ("done", 0, [])

        on_node(test, tier=tier)

    def test_what_is_lost_is_bad(self) -> None:
        tier, keys = MemoryTier(), chunk_keys(3)

        async def test(node: Node) -> None:
            store_small(node, ME, keys)
            await flush(node, ME)
            tier.delete([identity(keys[1], 0)])
            job = await ended(node, await begun(node, o.Scrub(1, "memory")))
            assert (job.failed, len(job.troubles)) == (1, 1)
            assert identity(keys[1], 0).hex() in job.troubles[0]

        on_node(test, tier=tier)


class TestInspect:
    def test_a_header_as_fields(self, disk: dict[str, Any]) -> None:
        async def test(node: Node) -> None:
            store(node)
            await flush(node, ME)
            raw: o.Inspected = await ask(node, o.Inspect(1, "host", KEYS[1]))
            assert (raw.problem, raw.header["codec"]) == ("", "raw")
            assert raw.header["parent"] == KEYS[0].hex()
            assert (raw.header["start"], raw.header["num_tokens"]) == (128, 128)
            encoded: o.Inspected = await ask(node, o.Inspect(1, "disk", KEYS[1]))
            assert (encoded.problem, encoded.header["codec"]) == ("", "lossless")
            assert encoded.nbytes < raw.nbytes
            assert encoded.header["raw_checksum"] == raw.header["raw_checksum"]
            absent: o.Inspected = await ask(node, o.Inspect(1, "disk", KEYS[1], 1))
            assert (absent.nbytes, absent.problem, absent.header) == (0, "it is not there", {})

        on_real_node(test, disk | {"disk.codec": "lossless"})

    @pytest.mark.parametrize(
        ("bit", "problem", "has_header"),
        [(8, "header begins with", False), (8 * 5000, "payload checksum does not match", True)],
    )
    def test_says_what_is_wrong_and_leaves_it_there(
        self, bit: int, problem: str, has_header: bool
    ) -> None:
        tier, keys = FaultyTier(MemoryTier()), chunk_keys(1)

        async def test(node: Node) -> None:
            store_small(node, ME, keys)
            await flush(node, ME)
            tier.inject("read", FlipBit(bit))
            seen: o.Inspected = await ask(node, o.Inspect(1, "memory", keys[0]))
            assert problem in seen.problem
            assert bool(seen.header) == has_header
            assert keys[0] in owned(node).index
            tier.heal()
            assert (await ask(node, o.Inspect(1, "memory", keys[0]))).problem == ""
            slot = node.host.get(keys[0], 0)
            assert slot is not None
            node.host.pool.view(slot.offset + bit // 8, 1)[0] ^= 1
            assert problem in (await ask(node, o.Inspect(1, "host", keys[0]))).problem
            assert node.host.get(keys[0], 0) is slot

        on_node(test, tier=tier)

    def test_in_a_shared_store(self, redis: RedisServer) -> None:
        async def test(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            store(node)
            await flush(node, ME)
            with pytest.raises(UsageError, match="known only by asking"):
                await ask(node, o.Inspect(1, "redis", KEYS[0]))
            how: dict[str, Any] = {"orders": [VEC], "namespace": NAMESPACE}
            seen: o.Inspected = await ask(node, o.Inspect(1, "redis", KEYS[0], **how))
            assert (seen.problem, seen.header["key"]) == ("", KEYS[0].hex())
            lost = bytes(31) + b"1"
            seen = await ask(node, o.Inspect(1, "redis", lost, **how))
            assert seen.problem == "it is not there"

        on_real_node(test, {"redis": {"url": redis.url}})


async def listed(node: Node, tier: str = "", limit: int = 2) -> list[o.Chunk]:
    found, after = [], b""
    while True:
        page: o.Listed = await ask(node, o.List(1, tier, after, limit))
        assert len(page.chunks) <= limit
        found += page.chunks
        after = page.next
        if not after:
            return found


class TestList:
    def test_where_each_chunk_is_and_what_it_descends_from(self) -> None:
        keys = chunk_keys(5)

        async def test(node: Node) -> None:
            store_small(node, ME, keys)
            await flush(node, ME)
            await clear(node, ME, keys[3:], ["host"])
            chunks = await listed(node)
            assert [one.key for one in chunks] == sorted(keys)
            for one in chunks:
                number = keys.index(one.key)
                assert one.parent == (keys[number - 1] if number else NO_PARENT)
                assert (one.start, one.num_tokens) == (128 * number, 128)
                assert one.namespace == NAMESPACE
                held = {"memory": SLOT} if number > 2 else {"host": SLOT, "memory": SLOT}
                assert one.tiers == held
                assert one.used > 0
            assert [one.key for one in await listed(node, "host")] == sorted(keys[:3])
            assert [one.key for one in await listed(node, "memory")] == sorted(keys)
            await clear(node, ME, tiers=["memory"])
            assert [one.key for one in await listed(node)] == sorted(keys[:3])
            await clear(node, ME)
            assert await listed(node) == []

        on_node(test, tier=MemoryTier())

    def test_the_last_use_is_that_of_the_last_match(self) -> None:
        keys = chunk_keys(2)

        async def test(node: Node) -> None:
            node.operations.lineage._now = lambda: 100.0
            store_small(node, ME, keys)
            node.operations.lineage._now = lambda: 200.0
            release(node, ME, match(node, ME, keys).lease)
            times = {one.key: one.used for one in await listed(node)}
            assert times == {keys[0]: 100.0, keys[1]: 200.0}

        on_node(test)

    def test_no_more_is_remembered_than_may_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lineage, "MAX_KNOWN", 3)
        keys = chunk_keys(6)

        async def test(node: Node) -> None:
            store_small(node, ME, keys)
            assert len(node.operations.lineage) == 3
            known = {one.key for one in await listed(node) if one.num_tokens}
            assert len(known) == 3
            assert len(await listed(node)) == 6
            assert {one.namespace for one in await listed(node)} == {NAMESPACE}

        on_node(test)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_pages_tell_each_chunk_that_stays_once(data: st.DataObject) -> None:
    """Against plain sets, with chunks that come and go between any two pages."""
    universe = [random.Random(number).randbytes(32) for number in range(24)]
    held: dict[str, set[bytes]] = {"host": set(), "disk": set()}
    directory = Directory({tier: held[tier].__contains__ for tier in held})

    def change() -> None:
        for _ in range(data.draw(st.integers(0, 6))):
            tier, key = (
                data.draw(st.sampled_from(["host", "disk"])),
                data.draw(st.sampled_from(universe)),
            )
            if key in held[tier] and data.draw(st.booleans()):
                directory.left(tier, key, 1, Cause.LOST)  # the other part is still there
            elif key in held[tier]:
                held[tier].discard(key)
                directory.left(tier, key, 0, Cause.EVICTED)
            else:
                held[tier].add(key)
                directory.entered(tier, key, 0)
                directory.entered(tier, key, 1)
        if data.draw(st.integers(0, 5)) == 0:
            held["disk"].clear()
            directory.emptied("disk")

    for _ in range(5):
        change()
    tiers = data.draw(st.sampled_from([["host"], ["disk"], ["host", "disk"]]))

    def union() -> set[bytes]:
        return {key for tier in tiers for key in held[tier]}

    stayed, ever, told, after = union(), union(), list[bytes](), b""
    while page := directory.after(tiers, after, data.draw(st.integers(1, 5))):
        told += page
        after = page[-1]
        change()
        stayed &= union()
        ever |= union()
    assert len(set(told)) == len(told)
    assert told == sorted(told)
    assert stayed <= set(told) <= ever


class TestDrain:
    def test_no_new_stores_and_what_is_behind_is_written(self) -> None:
        tier, keys = GatedTier(), chunk_keys(4)

        async def test(node: Node) -> None:
            tier.shut("write")
            store_small(node, ME, keys[:2])
            under_way, offsets = reserve(node, ME, keys[:3], 2)
            number = await begun(node, o.Drain(1))
            assert (await ask(node, o.Drain(1))).job == number
            assert node.status(ME, p.Status(1)).state["draining"] == "draining"
            assert reserve(node, ME, keys, 3)[1] == [p.DRAINING]
            assert reserve(node, ME, keys[:1])[1] == [p.PRESENT]
            with pytest.raises(Busy, match="is being drained"):
                await ask(node, o.Scrub(1, "host"))
            assert await load_small(node, ME, keys[:2]) == 2, "engines go on reading"
            await asyncio.sleep(0.1)
            job = node.operations.jobs.get(number)
            assert job is not None
            assert job.running
            assert "1 stores under way" in job.note
            tier.open()
            await flush(node, ME)
            assert job.running, "a store is still under way"
            sums = write_small(node, keys[2:3], offsets)
            await ask(node, p.Commit(1, under_way, b"".join(sums)))
            told = await ended(node, number)
            assert (told.state, told.note, told.done) == ("done", "all is written", told.total)
            assert len(owned(node).index) == 3
            assert (await ask(node, o.Undrain(1))).count == 1
            assert (await ask(node, o.Undrain(1))).count == 0
            assert store_small(node, ME, keys, 3) == 1

        on_node(test, tier=tier)

    def test_one_that_is_taken_back_ends(self) -> None:
        tier, keys = GatedTier(), chunk_keys(1)

        async def test(node: Node) -> None:
            tier.shut("write")
            store_small(node, ME, keys)
            number = await begun(node, o.Drain(1))
            await ask(node, o.Undrain(1))
            assert (await ended(node, number)).state == "cancelled"
            tier.open()

        on_node(test, tier=tier)

    def test_jobs_that_store_are_asked_to_end(self) -> None:
        tier, keys = GatedTier(), chunk_keys(9)

        async def test(node: Node) -> None:
            store_small(node, ME, keys)
            await flush(node, ME)
            await clear(node, ME, tiers=["memory"])
            tier.shut("write")
            copying = await begun(node, o.Copy(1, packed(keys), "host", "memory"))
            await until(lambda: tier.waiting > 0)
            number = await begun(node, o.Drain(1))
            tier.open()
            assert (await ended(node, copying)).state == "cancelled"
            assert (await ended(node, number)).state == "done"

        on_node(test, tier=tier)

    def test_a_node_that_is_to_end_waits_for_loads(self) -> None:
        keys, ends = chunk_keys(2), list[str]()

        async def test(node: Node) -> None:
            node.operations.drainer.end = lambda: ends.append("ended")
            store_small(node, ME, keys)
            lease = match(node, ME, keys).lease
            number = await begun(node, o.Drain(1, True))
            await until(lambda: node.operations.drainer.closing)
            assert match(node, ME, keys).lease == 0, "nothing new is given out"
            await asyncio.sleep(5 * draining.LOOK_S)
            assert ends == []
            release(node, ME, lease)
            assert (await ended(node, number)).state == "done"
            assert ends == ["ended"]

        on_node(test)

    def test_one_that_is_cancelled_lets_the_node_go_on(self) -> None:
        keys, ends = chunk_keys(2), list[str]()

        async def test(node: Node) -> None:
            node.operations.drainer.end = lambda: ends.append("ended")
            store_small(node, ME, keys)
            lease = match(node, ME, keys).lease
            number = await begun(node, o.Drain(1, True))
            await until(lambda: node.operations.drainer.closing)
            await ask(node, o.Cancel(1, number))
            assert (await ended(node, number)).state == "cancelled"
            assert node.operations.drainer.state == "draining", "it takes no stores, as before"
            assert await load_small(node, ME, keys) == 2
            release(node, ME, lease)
            assert (await ended(node, await begun(node, o.Drain(1)))).state == "done"
            assert ends == []

        on_node(test)


class TestReload:
    def test_what_may_change_does(self, disk: dict[str, Any]) -> None:
        async def test(node: Node) -> None:
            before = node.operations._reloader.config
            given = before.to_dict()
            given["leases"] = {"per_client": "10%", "total": "20%"}
            given["disk"] |= {"scrub_rate": "1MiB/s", "write_queue": "1MiB"}
            given["deadlines"] |= {"load": "3s", "match": "5ms"}
            given |= {"planner": "off"}
            given["host"] |= {"verify_every": 7}
            reloaded: o.Reloaded = await ask(node, o.Reload(1, given))
            assert sorted(reloaded.changed) == sorted([
                "leases.per_client", "leases.total", "disk.scrub_rate", "disk.write_queue",
                "deadlines.load", "planner", "host.verify_every",
            ])  # fmt: skip
            assert reloaded.engines == ["deadlines.match"]
            capacity = node.host.pool.capacity_bytes
            assert node.leases.per_client_bytes == capacity // 10
            assert node.leases.total_bytes == capacity // 5
            assert node.reservations.per_client_bytes == capacity // 10
            assert owned(node).scrub_bytes_per_s == owned(node).queue_bytes == 1 << 20
            assert owned(node)._calls._reads.deadline_s == 3.0
            assert node._matcher.planning is False
            assert node._sampler.every == 7
            again: o.Reloaded = await ask(node, o.Reload(1, given))
            assert (again.changed, again.engines) == ([], [])
            back: o.Reloaded = await ask(node, o.Reload(1, before.to_dict()))
            assert sorted(back.changed) == sorted(reloaded.changed)
            assert owned(node).scrub_bytes_per_s == before.tier("disk").scrub_rate  # type: ignore[union-attr]

        on_real_node(test, disk)

    @pytest.mark.parametrize(
        ("given", "why"),
        [
            ({"disk.capacity": "4MiB"}, "disk.capacity: cannot change while the node runs"),
            ({"host.policy": "s3fifo"}, "host.policy: cannot change while the node runs"),
            ({"memory.capacity": "1MiB"}, "memory.capacity: cannot change"),
            ({"disk.copacity": "4MiB"}, "disk.copacity: unknown key"),
            ({"linger": "soon"}, "linger: "),
        ],
    )
    def test_what_may_not_is_refused_whole(
        self, given: dict[str, Any], why: str, disk: dict[str, Any]
    ) -> None:
        async def test(node: Node) -> None:
            config, capacity = node.operations._reloader.config, node.leases.total_bytes
            flat = config.to_dict() | {"leases": {"total": "60%", "per_client": "10%"}}
            for path, value in given.items():
                part, _, name = path.rpartition(".")
                (flat.setdefault(part, {}) if part else flat)[name] = value
            with pytest.raises(ConfigError, match=why):
                await ask(node, o.Reload(1, flat))
            assert node.leases.total_bytes == capacity
            assert node.operations._reloader.config is config

        on_real_node(test, disk)

    def test_the_level_of_the_log(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import logging

        root = logging.getLogger()
        monkeypatch.setattr(root, "level", root.level)

        async def test(node: Node) -> None:
            given = node.operations._reloader.config.to_dict()
            await ask(node, o.Reload(1, given | {"log": "error"}))
            assert root.level == logging.ERROR

        on_real_node(test, {})


@pytest.mark.parametrize("held", ["leased", "reserved"])
def test_caps_may_be_lowered_below_what_is_held(held: str) -> None:
    async def test(node: Node) -> None:
        keys, sums = chunk_keys(8), list[bytes]()
        if held == "leased":
            store_small(node, ME, keys)
            lease = match(node, ME, keys).lease
        else:
            number, offsets = reserve(node, ME, keys)
            sums = write_small(node, keys, offsets)
        given = node.operations._reloader.config.to_dict()
        given["leases"] = {"per_client": "1%", "total": "2%"}
        await ask(node, o.Reload(1, given))
        node.check_integrity()
        more = chunk_keys(1, 1)
        assert held == "leased" or reserve(node, ME, more)[1] == [p.REFUSED]
        node.check_integrity()
        if held == "leased":
            release(node, ME, lease, 1)
            node.check_integrity()
            release(node, ME, lease)
            assert node.leases.leased_bytes == 0
        else:
            assert (await ask(node, p.Commit(1, number, b"".join(sums)))).count == 8
        node.check_integrity()

    on_real_node(test, {"host.capacity": "1MiB"})


def test_of_two_reloads_at_once_what_is_told_is_in_force() -> None:
    async def test(node: Node) -> None:
        before = node.operations._reloader.config.to_dict()
        one = before | {"host": before["host"] | {"verify_every": 7}}
        two = before | {"planner": "off"}
        await asyncio.gather(ask(node, o.Reload(1, one)), ask(node, o.Reload(2, two)))
        config = node.operations._reloader.config
        assert config.host.verify_every == node._sampler.every
        assert (config.planner == "on") is node._matcher.planning

    on_real_node(test, {"host.capacity": "1MiB"})


def test_what_can_be_reloaded_is_an_option() -> None:
    async def test(node: Node) -> None:
        reloader = node.operations._reloader
        assert {"log", "planner", "memory.scrub_rate"} <= set(reloader.options)
        assert load_config(environ={}, overrides=reloader.config.to_dict()) == reloader.config

    on_real_node(test, {"memory.capacity": "8MiB"})
