"""Chunks go from any tier to any other, whole or not at all, and a move loses none."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.nodes import (
    NAMESPACE,
    RAW,
    SLOT,
    GatedTier,
    chunk_keys,
    clear,
    flush,
    on_node,
    owned,
    until,
)
from tests.support.nodes import load as load_small
from tests.support.nodes import store as store_small
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
)
from tests.support.working import ask, begun, done, ended, packed

from kvstrata.errors import TierUnavailable, UsageError
from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.operating.copying import AT_ONCE
from kvstrata.objects import HEADER_BYTES, stored_bytes
from kvstrata.parts import identity
from kvstrata.testing.servers.redis import RedisServer, installed
from kvstrata.tiers.faulty import Answer, FaultyTier, FlipBit, Raise
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p

SHARED: dict[str, Any] = {"parts": [0], "orders": [VEC, "portable"], "namespace": NAMESPACE}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Tiers in memory and on disk, with codecs of their own."""
    return {
        "memory.capacity": "8MiB",
        "disk.path": tmp_path / "disk",
        "disk.capacity": "8MiB",
        "disk.codec": "raw",
    }


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    if not installed():
        pytest.skip("there is no redis-server here")
    server = RedisServer(tmp_path / "redis")
    yield server
    server.close()


def present(node: Node, tier: str, count: int = 3) -> list[bool]:
    """Which chunks an owned tier of the node has."""
    if tier == "host":
        return [node.host.get(key, 0) is not None for key in KEYS[:count]]
    (backing,) = [one for one in node.backings if one.name == tier]
    return [backing.find(key, 0, None) is not None for key in KEYS[:count]]


async def only_in(node: Node, tier: str) -> None:
    """Store all chunks, and have them in one tier alone."""
    store(node)
    await flush(node, ME)
    others = {"host", "memory", "disk"} - {tier}
    await clear(node, ME, tiers=sorted(others))
    assert present(node, tier) == [True] * 3


OWNED = ["host", "memory", "disk"]


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(OWNED, 2)))
def test_from_any_to_any(source: str, target: str, moves: bool, options: dict[str, Any]) -> None:
    async def test(node: Node) -> None:
        await only_in(node, source)
        message = o.Move if moves else o.Copy
        job = await done(node, message(1, packed(), source, target))
        assert (job.kind, job.done, job.note) == ("move" if moves else "copy", 3, "")
        assert job.nbytes == 3 * stored_bytes(NBYTES)
        assert present(node, target) == [True] * 3
        assert present(node, source) == [not moves] * 3
        again = await done(node, message(1, packed(), source, target))
        assert "3 were" in again.note
        assert again.nbytes == 0
        await clear(node, ME, tiers=[source])
        node.check_integrity(contents=True)
        tiers, payloads = await load(node)
        assert tiers == [OWNED.index(target)] * 3
        assert payloads == [chunk(number) for number in range(3)]
        for backing in node.backings:
            for _ in range(1000):
                await backing.upkeep()
                if not backing.scratch_bytes:
                    break
                await asyncio.sleep(0.01)
            else:
                pytest.fail(f"{backing.name} was not given back all its buffers")

    on_real_node(test, options)


def test_to_a_redis_and_back(options: dict[str, Any], redis: RedisServer) -> None:
    fleet = {"redis": {"url": redis.url, "lookup_timeout": "2s", "codec": "lossless"}}

    async def test(node: Node) -> None:
        await until(lambda: node.backings[2].state == "ok")
        await only_in(node, "disk")
        # What the write behind has put there already is of no use here.
        before = node.backings[2].tier
        await clear(node, ME, KEYS, ["redis"])
        with pytest.raises(UsageError, match="redis is shared, and known only by asking"):
            await ask(node, o.Copy(1, packed(), "disk", "redis"))
        await done(node, o.Move(1, packed(), "disk", "redis", **SHARED))
        assert present(node, "disk") == [False] * 3
        assert (await load_shared(node))[1] == [chunk(number) for number in range(3)]
        await flush(node, ME)
        await clear(node, ME, KEYS, ["host", "memory", "disk"])
        await done(node, o.Move(1, packed(), "redis", "disk", **SHARED))
        assert present(node, "disk") == [True] * 3
        await clear(node, ME, tiers=["host", "memory"])
        tiers, payloads = await load(node)
        assert (tiers, payloads) == ([2] * 3, [chunk(number) for number in range(3)])
        await clear(node, ME, KEYS, ["host", "memory", "disk"])
        assert await load_shared(node) == ([], []), "it has left the store"
        assert before is node.backings[2].tier

    on_real_node(test, options | fleet)


def test_a_chunk_with_all_its_parts_or_none() -> None:
    """A chunk that lacks one rank's object is of no use, so it does not leave its tier."""
    tier = FaultyTier(MemoryTier())
    keys = chunk_keys(2)

    async def test(node: Node) -> None:
        for part in (0, 1):
            store_small(node, ME, keys, part=part)
        await flush(node, ME)
        await clear(node, ME, tiers=["memory"])
        tier.inject("write", Answer(), when=lambda id: id == identity(keys[0], 1))
        job = await ended(node, await begun(node, o.Move(1, packed(keys), "host", "memory")))
        assert (job.state, job.done, job.failed) == ("done", 2, 1)
        assert identity(keys[0], 1).hex() in job.troubles[0]
        assert [node.host.get(keys[0], part) is not None for part in (0, 1)] == [True, True]
        assert [node.host.get(keys[1], part) is not None for part in (0, 1)] == [False, False]
        tier.heal()
        await done(node, o.Move(1, packed(keys), "host", "memory"))
        assert len(node.host.index) == 0
        assert await load_small(node, ME, keys, (0, 1)) == 2

    on_node(test, tier=tier)


def test_what_is_not_what_was_stored_goes_nowhere() -> None:
    tier = FaultyTier(MemoryTier())
    keys = chunk_keys(2)

    async def test(node: Node) -> None:
        store_small(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        tier.inject("read", FlipBit(50_000 % (8 * RAW)), when=lambda id: id == identity(keys[0], 0))
        job = await ended(node, await begun(node, o.Move(1, packed(keys), "memory", "host")))
        assert (job.failed, node.host.get(keys[0], 0)) == (1, None)
        assert node.counters.get("corrupt_objects_total", tier="memory") == 1
        slot = node.host.get(keys[1], 0)
        assert slot is not None
        node.host.pool.view(slot.offset + HEADER_BYTES, 1)[0] ^= 1
        job = await ended(node, await begun(node, o.Copy(2, packed(keys), "host", "memory")))
        assert "payload checksum does not match" in job.troubles[0]
        assert keys[1] not in owned(node).index, "it had left, and nothing came back"
        assert node.host.get(keys[1], 0) is None

    on_node(test, tier=tier)


def test_a_tier_that_goes_off_ends_the_job_and_loses_nothing() -> None:
    tier = FaultyTier(MemoryTier())
    keys = chunk_keys(20)

    async def test(node: Node) -> None:
        store_small(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        tier.inject("read", Raise(TierUnavailable("it has gone")), skip=6)
        job = await ended(node, await begun(node, o.Move(1, packed(keys), "memory", "host")))
        assert (job.state, job.note) == ("failed", "memory: off: it has gone")
        assert 0 < job.done < 20
        for key in keys:
            assert (node.host.get(key, 0) is not None) != (key in owned(node).index)

    on_node(test, tier=tier, slots=30)


@pytest.mark.parametrize("keys", [None, "some"])
@pytest.mark.parametrize(
    ("verb", "source", "target"), [("write", "host", "memory"), ("read", "memory", "host")]
)
def test_what_is_cleared_on_its_way_does_not_come_back(
    verb: str, source: str, target: str, keys: str | None
) -> None:
    tier = GatedTier()
    chunks = chunk_keys(3)

    async def test(node: Node) -> None:
        store_small(node, ME, chunks)
        await flush(node, ME)
        await clear(node, ME, tiers=[target])
        tier.shut(verb)
        number = await begun(node, o.Copy(1, packed(chunks), source, target))
        await until(lambda: tier.waiting > 0)
        clearing = asyncio.ensure_future(clear(node, ME, chunks if keys else None))
        await asyncio.sleep(0)
        tier.open()
        await clearing
        job = await ended(node, number)
        assert job.state == "done"
        assert len(node.host.index) == len(owned(node).index) == 0
        assert await load_small(node, ME, chunks) == 0

    on_node(test, tier=tier)


def test_a_job_that_is_cancelled_ends_between_two_chunks() -> None:
    tier = GatedTier()
    keys = chunk_keys(30)

    async def test(node: Node) -> None:
        store_small(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["memory"])
        tier.shut("write")
        message = o.Move(1, packed(keys), "host", "memory")
        number = await begun(node, message)
        await until(lambda: tier.waiting > 0)
        again: o.Started = await ask(node, message)
        assert (again.job, again.again) == (number, True)
        assert (await ask(node, o.Cancel(1, number))).count == 1
        tier.open()
        job = await ended(node, number)
        assert job.state == "cancelled"
        assert len(node.host.index) + len(owned(node).index) == 30
        assert (await ask(node, o.Cancel(1, number))).count == 0
        await done(node, message)
        assert (len(node.host.index), len(owned(node).index)) == (0, 30)

    on_node(test, tier=tier, slots=40)


def test_no_more_than_a_tier_may_hold() -> None:
    keys = chunk_keys(10)

    async def test(node: Node) -> None:
        store_small(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["memory"])
        await done(node, o.Move(1, packed(keys), "host", "memory"))
        assert (len(owned(node).index), len(node.host.index)) == (4, 0)

    on_node(test, tier=MemoryTier(), slots=20, tier_slots=4)


def test_a_prompt_that_is_moved_has_no_hole_at_any_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk that is slow to come keeps those behind it where they are, though they have come."""
    keys = chunk_keys(12)

    async def test(node: Node) -> None:
        store_small(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["memory"])
        backing, slow = owned(node), asyncio.Event()
        write, come = backing.write, set[bytes]()

        async def written(key: bytes, *how: Any) -> bool:
            if key == keys[4]:
                await slow.wait()
            stored = await write(key, *how)
            come.add(key)
            return stored

        monkeypatch.setattr(backing, "write", written)
        number = await begun(node, o.Move(1, packed(keys), "host", "memory"))
        await until(lambda: come == {*keys[:4], *keys[5:8]})
        for _ in range(20):
            await asyncio.sleep(0)  # whoever removes something now can do so
        assert set(node.host.index.keys()) == set(keys[4:])
        slow.set()
        assert (await ended(node, number)).failed == 0
        assert set(backing.index.keys()) == set(keys)
        assert not len(node.host.index)

    on_node(test, tier=MemoryTier(), slots=20)


def test_what_is_cleared_while_others_come_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = chunk_keys(4)

    async def test(node: Node) -> None:
        store_small(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["memory"])
        backing, slow = owned(node), asyncio.Event()
        write = backing.write

        async def written(key: bytes, *how: Any) -> bool:
            if key == keys[0]:
                await slow.wait()
            return await write(key, *how)

        monkeypatch.setattr(backing, "write", written)
        number = await begun(node, o.Move(1, packed(keys), "host", "memory"))
        await until(lambda: {*keys[1:]} <= set(backing.index.keys()))
        await clear(node, ME, [keys[2]])
        slow.set()
        job = await ended(node, number)
        assert (job.state, job.failed, job.troubles) == ("done", 0, [])
        assert set(backing.index.keys()) == {keys[0], keys[1], keys[3]}
        assert not len(node.host.index)

    on_node(test, tier=MemoryTier())


def test_what_does_not_stay_in_one_tier_stays_in_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room may be made for something else before a chunk has been looked for again."""
    keys = chunk_keys(3)

    async def test(node: Node) -> None:
        store_small(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["memory"])
        backing = owned(node)
        write = backing.write

        async def evicted_at_once(key: bytes, *how: Any) -> bool:
            stored = await write(key, *how)
            if key == keys[1]:
                await backing.drop([key])
            return stored

        monkeypatch.setattr(backing, "write", evicted_at_once)
        job = await ended(node, await begun(node, o.Move(1, packed(keys), "host", "memory")))
        assert (job.failed, job.troubles) == (
            1, [f"chunk {keys[1].hex()} did not stay in memory, so it stays in host"],
        )  # fmt: skip
        assert set(node.host.index.keys()) == {keys[1]}

    on_node(test, tier=MemoryTier())


def test_two_moves_in_opposite_directions_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that is in both tiers leaves one of them, whoever is slower to remove it."""
    keys = chunk_keys(8)

    async def test(node: Node) -> None:
        store_small(node, ME, keys)
        await flush(node, ME)
        backing, slow = owned(node), asyncio.Event()
        remove = backing.remove

        async def removed(*what: Any) -> bool:
            await slow.wait()
            return await remove(*what)

        monkeypatch.setattr(backing, "remove", removed)
        back = await begun(node, o.Move(1, packed(keys), "memory", "host"))
        for _ in range(20):
            await asyncio.sleep(0)
        forth = await ended(node, await begun(node, o.Move(1, packed(keys), "host", "memory")))
        slow.set()
        assert (await ended(node, back)).failed == 0
        here, there = set(node.host.index.keys()), set(backing.index.keys())
        assert here | there == set(keys)
        assert not here & there
        assert forth.failed == AT_ONCE
        assert "did not stay in memory" in forth.troubles[0]
        await done(node, o.Move(1, packed(keys), "host", "memory"))
        assert set(backing.index.keys()) == set(keys)

    on_node(test, tier=MemoryTier(), slots=20)


def test_what_is_pinned_does_not_leave_the_tiers_that_keep_pins() -> None:
    keys, owner = chunk_keys(2), bytes(15) + b"a"

    async def test(node: Node) -> None:
        store_small(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        pinned = await ask(node, p.Pin(1, keys[0], owner, "prompt", 60.0))
        assert pinned.num_kept == 1
        job = await ended(node, await begun(node, o.Move(1, packed(keys), "memory", "host")))
        assert (job.failed, job.troubles) == (
            1, [f"chunk {keys[0].hex()} is pinned, so it stays in memory too"],
        )  # fmt: skip
        assert set(owned(node).index.keys()) == {keys[0]}
        assert set(node.host.index.keys()) == set(keys)
        await done(node, o.Transcode(1, "memory", "lossless"))
        assert owned(node).index.nbytes(keys[0]) < SLOT
        assert keys[0] in owned(node).index.pinned

    on_node(test, tier=MemoryTier())


def test_what_may_have_been_lossy_is_not_made_so_again(tmp_path: Path) -> None:
    options = {
        "memory.capacity": "8MiB",
        "memory.codec": "int4",
        "disk.path": tmp_path / "disk",
        "disk.capacity": "8MiB",
        "disk.codec": "int8",
    }

    async def test(node: Node) -> None:
        await only_in(node, "memory")
        job = await ended(node, await begun(node, o.Copy(1, packed(), "memory", "disk")))
        assert job.failed == 3
        assert (
            "disk stores with int8, and this may have been through a lossy codec" in job.troubles[0]
        )
        assert present(node, "disk") == [False] * 3
        await done(node, o.Move(1, packed(), "memory", "host"))
        job = await ended(node, await begun(node, o.Copy(1, packed(), "host", "disk")))
        assert job.failed == 3

    on_real_node(test, options)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (o.Copy(1, packed(), "host", "dsk"), "no tier 'dsk' here; did you mean disk?"),
        (o.Move(1, packed(), "disk", "disk"), "there is no way to go"),
        (o.Copy(1, b"", "host", "disk"), "keys of one chunk at least"),
        (o.Copy(1, packed(), "host", "disk", [0, 0]), "each once"),
        (o.Move(1, packed(), "disk", "host", namespace=b"1"), "a namespace of 1 bytes"),
        (o.Transcode(1, "host", "int4"), "host memory holds objects raw"),
        (o.Scrub(1, "tape"), "no tier 'tape'"),
        (o.Cancel(1, 99), "no job 99"),
        (o.List(1, "tape"), "no tier 'tape'"),
        (o.Inspect(1, "host", b"k"), "a key of 1 bytes"),
        (o.Send(1, packed(), "127.0.0.1:1"), "asks no others"),
        (o.Drain(1, True), "inside another program"),
    ],
)
def test_what_cannot_be_is_refused_by_name(message: Any, why: str, options: dict[str, Any]) -> None:
    async def test(node: Node) -> None:
        with pytest.raises(UsageError, match=re.escape(why)):
            await ask(node, message)
        assert node.operations.jobs.running == []
        assert node.operations.drainer.state == "no"

    on_real_node(test, options)


def test_watchers_hear_that_it_was_moved() -> None:
    class Watching:
        def __init__(self) -> None:
            self.heard: list[tuple[str, str]] = []

        def entered(self, tier: str, key: bytes, part: int) -> None:
            self.heard.append((tier, "entered"))

        def found(self, tier: str, names: Sequence[tuple[bytes, int]]) -> None:
            pass

        def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
            self.heard.append((tier, cause.value))

        def emptied(self, tier: str) -> None:
            pass

    async def test(node: Node) -> None:
        keys, watching = chunk_keys(1), Watching()
        store_small(node, ME, keys)
        await flush(node, ME)
        await clear(node, ME, tiers=["memory"])
        node.changes.watch(watching)
        await done(node, o.Move(1, packed(keys), "host", "memory"))
        await done(node, o.Move(1, packed(keys), "memory", "host"))
        assert watching.heard == [
            ("memory", "entered"), ("host", "moved"), ("host", "entered"), ("memory", "moved"),
        ]  # fmt: skip

    on_node(test, tier=MemoryTier())
