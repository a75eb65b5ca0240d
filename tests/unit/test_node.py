"""A node driven directly: who gets slots, what a match is, what eviction, clears and faults do."""

from __future__ import annotations

import asyncio
import datetime
import math
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.nodes import (
    NAMESPACE,
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
    payload,
    release,
    reserve,
    store,
    stored_payload,
    template,
    until,
    write,
)

from kvstrata.config import load_config
from kvstrata.errors import Incompatible, TierFull, TierUnavailable, UsageError
from kvstrata.node.arriving import MAX_WAITING
from kvstrata.node.common import backoff as backoff_module
from kvstrata.node.common import slices
from kvstrata.node.common.background import Threads
from kvstrata.node.node import Node
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.service.origin import Origin
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, decode, verify_object
from kvstrata.parts import identity
from kvstrata.testing.clock import ManualClock
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.tiers.faulty import Answer, FaultyTier, FlipBit, Raise
from kvstrata.tiers.marks import Mark
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

ME, YOU = "pid 1", "pid 2"
TIME = datetime.datetime.now(datetime.timezone.utc)


class TestReserveAndCommit:
    def test_what_was_written_comes_back(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(4)
            assert store(node, me, keys) == 4
            assert await load(node, me, keys) == 4
            (offset, *_) = offsets_of(match(node, me, keys).offsets)
            header = verify_object(node.host.pool.view(offset, SLOT), identity(keys[0], 0))
            assert (header.start, header.parent) == (0, bytes(32))

        on_node(test)

    def test_a_tail_is_the_last_of_its_prompt(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            store(node, me, keys[:2])
            whole = template()
            short = msgspec.structs.replace(
                whole, num_tokens=whole.num_tokens - 1, chunk_tokens=whole.num_tokens
            )
            ask = p.Reserve(1, NAMESPACE, b"".join(keys), 2, 0, short)
            reserved = at_once(node.reserve(me, ask))
            at_once(node.commit(me, p.Commit(2, reserved.reservation, bytes(15) + b"x")))
            slot = node.host.get(keys[2], 0)
            assert slot is not None
            header = decode(node.host.pool.view(slot.offset, SLOT))
            assert (header.start, header.num_tokens) == (2 * whole.num_tokens, short.num_tokens)
            assert (header.chunk_tokens, header.parent) == (whole.num_tokens, keys[1])
            with pytest.raises(UsageError, match="a tail is one object"):
                at_once(node.reserve(me, msgspec.structs.replace(ask, first=1)))
            longer = msgspec.structs.replace(short, num_tokens=whole.num_tokens + 1)
            with pytest.raises(UsageError, match="tokens of a chunk of"):
                at_once(node.reserve(me, msgspec.structs.replace(ask, template=longer)))

        on_node(test)

    def test_headers_know_parent_and_position(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(4)
            store(node, me, keys[:2])
            store(node, me, keys, first=2, part=3)
            offset = node.host.get(keys[3], 3).offset  # type: ignore[union-attr]
            header = verify_object(node.host.pool.view(offset, SLOT), identity(keys[3], 3))
            assert (header.start, header.parent, header.rank) == (3 * 128, keys[2], 3)

        on_node(test)

    def test_one_writes_and_the_other_is_told(self) -> None:
        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(2)
            mine, offsets = reserve(node, me, keys)
            assert min(offsets) >= 0
            assert reserve(node, you, keys)[1] == [p.BUSY, p.BUSY]
            at_once(node.commit(me, p.Commit(1, mine, b"".join(write(node, keys, offsets)))))
            assert reserve(node, you, keys)[1] == [p.PRESENT, p.PRESENT]

        on_node(test)

    def test_nothing_half_written_is_visible(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(2)
            number, offsets = reserve(node, me, keys)
            sums = write(node, keys, offsets)
            assert match(node, me, keys).lease == 0
            assert at_once(node.lookup(me, p.Lookup(1, b"".join(keys), [0]))).tiers == b"\xff\xff"
            at_once(node.commit(me, p.Commit(1, number, b"".join(sums))))
            assert len(match(node, me, keys).tiers) == 2

        on_node(test)

    def test_a_failed_store_leaves_nothing(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            number, offsets = reserve(node, me, keys)
            sums = write(node, keys, offsets)
            done = at_once(node.commit(me, p.Commit(1, number, sums[0] + bytes(16) + sums[2])))
            assert done.count == 2
            assert len(match(node, me, keys).tiers) == 1
            assert node.host.get(keys[1], 0) is None
            assert node.host.allocated_bytes == 2 * SLOT

        on_node(test)

    def test_commit_counts_once(self) -> None:
        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(2)
            number, offsets = reserve(node, me, keys)
            commit = p.Commit(1, number, b"".join(write(node, keys, offsets)))
            with pytest.raises(UsageError, match="on the connection that made it"):
                at_once(node.commit(you, commit))
            with pytest.raises(UsageError, match="2 checksums expected, not 1"):
                at_once(node.commit(me, p.Commit(1, number, bytes(16))))
            assert at_once(node.commit(me, commit)).count == 2
            assert at_once(node.commit(me, commit)).count == 0

        on_node(test)

    def test_another_byte_order_does_not_count_and_may_be_replaced(self) -> None:
        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(2)
            store(node, me, keys)
            leased = match(node, me, keys)
            assert match(node, you, keys, orders=[OTHER]).lease == 0
            assert len(match(node, you, keys, orders=[OTHER, ORDER]).tiers) == 2
            assert store(node, you, keys, order=OTHER) == 2
            assert len(match(node, you, keys, orders=[OTHER]).tiers) == 2
            assert match(node, me, keys).lease == 0
            # The reader of the first order still has its bytes.
            for key, offset in zip(keys, offsets_of(leased.offsets), strict=True):
                assert stored_payload(node, offset) == payload(key)

        on_node(test)

    def test_no_room_is_said(self) -> None:
        async def test(node: Node) -> None:
            me, you = Client(ME), Client(YOU)
            reserve(node, you, chunk_keys(2))
            assert reserve(node, me, chunk_keys(4, 2))[1][2:] == [p.FULL, p.FULL]
            assert reserve(node, me, chunk_keys(1, 1), nbytes=SLOT * 5)[1] == [p.REFUSED]

        on_node(test, slots=4)

    def test_a_client_reserves_its_share_only(self) -> None:
        async def test(node: Node) -> None:
            me, you = Client(ME), Client(YOU)
            _, offsets = reserve(node, me, chunk_keys(3))
            assert [offset < 0 for offset in offsets] == [False, False, True]
            assert offsets[2] == p.REFUSED
            assert min(reserve(node, you, chunk_keys(2, 1))[1]) >= 0

        on_node(test, slots=4, per_client=0.5)

    def test_a_tail_does_not_cost_its_own_head(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(6)
            store(node, me, keys[:4])
            assert reserve(node, me, keys, first=4)[1] == [p.FULL, p.FULL]
            assert await load(node, me, keys) == 4

        on_node(test, slots=4)


class TestBadRequests:
    """Each is refused in words, and the node lives."""

    @pytest.mark.parametrize("tiers", [[], ["host"]])
    def test_a_clear_of_half_a_key(self, tiers: list[str]) -> None:
        async def test(node: Node) -> None:
            me = Client(ME)
            store(node, me, chunk_keys(1))
            for packed in (bytes(31), bytes(33)):
                with pytest.raises(Incompatible, match="32"):
                    await node.clear(me, p.Clear(1, packed, tiers))
            assert len([*node.host.index.keys()]) == 1

        on_node(test)

    @pytest.mark.parametrize("parts", [[], [0, 0], [-1], [1 << 32]])
    def test_parts(self, parts: list[int]) -> None:
        async def test(node: Node) -> None:
            for request in (p.Match(1, bytes(32), parts, []), p.Lookup(1, bytes(32), parts)):
                with pytest.raises(UsageError, match="parts"):
                    node.handle(Client(ME), request)

        on_node(test)

    def test_columns(self) -> None:
        async def test(node: Node) -> None:
            me = Client(ME)
            for request in (
                p.Match(1, bytes(33), [0], []),
                p.Lookup(1, bytes(31), [0]),
                p.Clear(1, bytes(5), []),
                p.Reserve(1, NAMESPACE, bytes(33), 0, 0, template()),
            ):
                with pytest.raises(Incompatible, match="no multiple of 32"):
                    node.handle(me, request)
            with pytest.raises(UsageError, match="have one key"):
                match(node, me, chunk_keys(1) * 2)

        on_node(test)

    @pytest.mark.parametrize(
        "change",
        [
            {"namespace": b"short"},
            {"prefix": b""},
            {"first": -1},
            {"first": 2},
            {"first": 1 << 63},
            {"part": -1},
            {"part": 1 << 32},
            {"cost": math.nan},
            {"cost": math.inf},
            {"cost": -1.0},
            {"prefix": bytes(64)},
            {"template": p.Template("native", ORDER, "bfloat16", [1], 128, 0)},
            {"template": p.Template("native", ORDER, "bfloat16", [1], 128, -4096)},
            {"template": p.Template("native", ORDER, "bfloat16", [], 128, RAW)},
            {"template": p.Template("native", ORDER, "bfloat16", [1], 0, RAW)},
            {"template": p.Template("native", ORDER, "bfloat16", [1], 1 << 63, RAW)},
            {"template": p.Template("native", "", "bfloat16", [1], 128, RAW)},
            {"template": p.Template("native", "portable", "bfloat16", [1], 128, RAW)},
            {"template": p.Template("portable", ORDER, "bfloat16", [1], 128, RAW)},
            {"template": p.Template("strange", "", "bfloat16", [1], 128, RAW)},
            {"template": p.Template("native", "a b", "bfloat16", [1], 128, RAW)},
            {"template": p.Template("native", ORDER, "bfloat16", [1, RAW], 4097, RAW)},
            {"owner": b"somebody"},
            {"prefix": b"".join(chunk_keys(1) * 2)},
        ],
    )
    def test_reserve(self, change: dict[str, Any]) -> None:
        async def test(node: Node) -> None:
            fields = {
                "id": 1,
                "namespace": NAMESPACE,
                "prefix": b"".join(chunk_keys(2)),
                "first": 0,
                "part": 0,
                "template": template(),
                "cost": 0.0,
            }
            with pytest.raises(UsageError):
                at_once(node.reserve(Client(ME), p.Reserve(**{**fields, **change})))
            node.check_integrity()
            assert store(node, Client(ME), chunk_keys(2)) == 2

        on_node(test)

    def test_the_rest(self) -> None:
        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(2)
            with pytest.raises(UsageError, match="no lease 7"):
                node.await_arrival(me, p.Await(1, 7, 0))
            with pytest.raises(UsageError, match="no tier 'tape'"):
                node.clear(me, p.Clear(1, None, ["tape"]))
            node.release(me, p.Release(7, 0))
            assert at_once(node.commit(me, p.Commit(1, 7, b""))).count == 0
            store(node, me, keys)
            lease = match(node, me, keys).lease
            with pytest.raises(UsageError, match="-1 chunks"):
                node.await_arrival(me, p.Await(1, lease, -1))
            with pytest.raises(UsageError, match="granted it"):
                node.release(you, p.Release(lease, 0))
            release(node, me, lease, keep=-(1 << 60))
            assert len(node.leases) == 0

        on_node(test)

    def test_an_outcome_is_a_word_or_other(self) -> None:
        async def test(node: Node) -> None:
            for outcome in ("hit", 'x"} 1\n', "y" * 1000, 5):
                node.record(Client(ME), p.Record({"outcome": outcome}))
            assert node.counters.get("requests_total", outcome="hit") == 1
            assert node.counters.get("requests_total", outcome="other") == 2

        on_node(test)


class TestLeases:
    def test_a_lease_holds_bytes_still_under_pressure(self) -> None:
        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(3)
            store(node, me, keys)
            matched = match(node, me, keys)
            for prompt in range(1, 20):
                store(node, you, chunk_keys(2, prompt))
            for key, offset in zip(keys, offsets_of(matched.offsets), strict=True):
                assert stored_payload(node, offset) == payload(key)
            found = at_once(node.lookup(you, p.Lookup(1, b"".join(keys), [0]))).tiers
            assert found == bytes(3), "what is leased is not evicted"
            release(node, me, matched.lease)
            for prompt in range(20, 40):
                store(node, you, chunk_keys(2, prompt))
            assert match(node, me, keys).lease == 0

        on_node(test, slots=5)

    def test_a_cleared_chunk_keeps_its_bytes_until_release(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(2)
            store(node, me, keys)
            matched = match(node, me, keys)
            assert await clear(node, me) == 2
            assert match(node, me, keys).lease == 0
            assert node.host.allocated_bytes == 2 * SLOT
            store(node, me, chunk_keys(2, 1))
            for key, offset in zip(keys, offsets_of(matched.offsets), strict=True):
                assert stored_payload(node, offset) == payload(key)
            release(node, me, matched.lease)
            assert node.host.allocated_bytes == 2 * SLOT

        on_node(test, slots=4)

    def test_caps_make_a_match_partial(self) -> None:
        async def test(node: Node) -> None:
            me, you, other = Client(ME), Client(YOU), Client("pid 3")
            keys, others = chunk_keys(6), chunk_keys(4, 1)
            store(node, me, keys)
            store(node, me, others)
            mine = match(node, me, keys)
            assert len(mine.tiers) == 5  # half of the pool for one client
            assert match(node, me, others).lease == 0
            assert len(match(node, you, others).tiers) == 3  # 80% for all
            assert len(match(node, other, others).tiers) == 3  # leased already
            release(node, me, mine.lease, keep=4)
            assert len(match(node, other, keys).tiers) == 5
            node.leases.check_integrity()

        on_node(test, slots=10, per_client=0.5, total=0.8)

    def test_release_in_parts(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            store(node, me, keys)
            lease = match(node, me, keys).lease
            rows = [node.host.ready_row(key, (0,)) for key in keys]
            release(node, me, lease, keep=2)
            assert [row.num_leases for row in rows if row is not None] == [1, 1, 0]
            release(node, me, lease, keep=5)
            assert (await arrive(node, me, lease)).ready == 2
            release(node, me, lease)
            release(node, me, lease)
            assert node.leases.leased_bytes == me.leased_bytes == 0

        on_node(test)

    def test_the_end_of_a_client_frees_all_it_holds(self) -> None:
        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(2)
            store(node, me, keys)
            match(node, me, keys)
            match(node, you, keys)
            reserve(node, me, chunk_keys(2, 1))
            node.end(me)
            assert (me.leases, me.reservations) == (set(), set())
            assert node.leases.leased_bytes == 2 * SLOT  # the other still has them
            assert node.host.allocated_bytes == 2 * SLOT
            assert len(node.leases) == 1

        on_node(test)


class TestEviction:
    def test_whole_chunks_tails_before_heads_across_commits(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(4)
            for part in (0, 1):
                store(node, me, keys[:2], part=part)
            for part in (0, 1):
                store(node, me, keys, first=2, part=part)
            left = []
            for prompt in range(1, 5):
                store(node, me, chunk_keys(1, prompt))
                parts = [[node.host.get(key, part) is not None for part in (0, 1)] for key in keys]
                assert all(has == [has[0]] * 2 for has in parts), "half a chunk was evicted"
                left.append(sum(has[0] for has in parts))
                assert [has[0] for has in parts] == [True] * left[-1] + [False] * (4 - left[-1])
            assert left == [3, 3, 2, 2]

        on_node(test, slots=8)

    @pytest.mark.parametrize("num_threads", [1, 4])
    def test_so_it_is_in_slower_tiers(self, num_threads: int) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(6)
            backing = owned(node)
            for part in (0, 1):
                store(node, me, keys[:3], part=part)
                await flush(node, me)
            for part in (0, 1):
                store(node, me, keys, first=3, part=part)
                await flush(node, me)
            for prompt in range(1, 12):
                store(node, me, chunk_keys(1, prompt))
                await flush(node, me)
                has = [key in backing.index for key in keys]
                assert has == sorted(has, reverse=True), "a head went before its tail"
                assert all(len(list(backing.index.objects(k))) in (0, 2) for k in keys)
            assert has == [True] + [False] * 5

        on_node(test, slots=40, tier=MemoryTier(), tier_slots=13, num_threads=num_threads)

    def test_and_after_a_restart(self) -> None:
        # A scan finds what was written first first, so the tail must be written before its head.
        order: list[bytes] = []

        class Recorder(MemoryTier):
            def write(self, puts: Any) -> Any:
                order.extend(put.object_id for put in puts)
                return super().write(puts)

        async def test(node: Node) -> None:
            store(node, Client(ME), chunk_keys(4))
            await flush(node, Client(ME))
            assert order == [identity(key, 0) for key in reversed(chunk_keys(4))]

        on_node(test, tier=Recorder(), num_threads=1)

    def test_use_is_told_to_the_tier_tail_first(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            store(node, me, keys)
            await flush(node, me)
            await load(node, me, keys)
            await owned(node).upkeep()
            assert tier.touched == [identity(key, 0) for key in reversed(keys)]

        on_node(test, tier=tier)

    @pytest.mark.parametrize("policy", ["lru", "s3fifo", "cost"])
    def test_capacity_is_never_exceeded_not_even_while_deletes_are_slow(self, policy: str) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me = Client(ME)
            store(node, me, chunk_keys(5))
            await flush(node, me)
            tier.shut("delete")
            store(node, me, chunk_keys(4, 1))
            await until(lambda: tier.waiting == 2)
            assert tier.held <= 5 * SLOT
            assert owned(node).index.used_bytes <= 5 * SLOT
            node.check_integrity()
            tier.open()
            await flush(node, me)
            assert tier.held == owned(node).index.used_bytes <= 5 * SLOT
            assert tier.most <= 5 * SLOT

        on_node(test, slots=10, tier=tier, tier_slots=5, policy=policy)


class TestSlowerTiers:
    def test_promotion(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            for part in (0, 1):
                store(node, me, keys, part=part)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            assert at_once(node.lookup(me, p.Lookup(1, b"".join(keys), [0, 1]))).tiers == b"\1\1\1"
            matched = match(node, me, keys, parts=[0, 1])
            assert matched.tiers == b"\1\1\1"
            assert set(offsets_of(matched.offsets)) == {p.ARRIVING}
            release(node, me, matched.lease)
            assert await load(node, me, keys, parts=[0, 1]) == 3
            assert at_once(node.lookup(me, p.Lookup(1, b"".join(keys), [0, 1]))).tiers == b"\0\0\0"

        on_node(test, tier=MemoryTier())

    def test_a_match_counts_where_its_chunks_were_and_how_many_were_nowhere(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(9)
            store(node, me, keys[:5])
            await flush(node, me)
            await clear(node, me, keys[2:], ["host"])
            assert match(node, me, keys).tiers == b"\0\0\1\1\1"
            counted = node.counters.snapshot()
            assert counted["matches_total"] == 1
            assert counted['hit_chunks_total{tier="host"}'] == 2
            assert counted['hit_chunks_total{tier="memory"}'] == 3
            assert counted["missed_chunks_total"] == 4
            match(node, me, keys[:2])
            assert node.counters.get("missed_chunks_total") == 4

        on_node(test, tier=MemoryTier())

    def test_so_many_wait_for_one_lease_and_no_more(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(1)
            store(node, me, keys)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            tier.shut("read")
            lease = match(node, me, keys).lease
            waiting = [node.await_arrival(me, p.Await(i, lease, 0)) for i in range(MAX_WAITING)]
            with pytest.raises(UsageError, match="already"):
                node.await_arrival(me, p.Await(MAX_WAITING, lease, 0))
            tier.open()
            for answer in waiting:
                assert isinstance(answer, Awaitable)
                assert isinstance(arrived := await answer, p.Arrived)
                assert arrived.ready == 1

        on_node(test, tier=tier)

    def test_two_matches_share_one_promotion(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(2)
            store(node, me, keys)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            tier.shut("read")
            first, second = match(node, me, keys), match(node, you, keys)
            node.check_integrity()
            assert node.host.allocated_bytes == 2 * SLOT
            tier.open()
            for client, lease in ((me, first.lease), (you, second.lease)):
                ready = 0
                while ready < 2:
                    ready = (await arrive(node, client, lease, ready)).ready
                release(node, client, lease)
            assert node.counters.get("promotions_total", outcome="done") == 2

        on_node(test, tier=tier)

    def test_no_room_to_promote_makes_a_match_partial_at_once(self) -> None:
        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(3)
            for part in (0, 1):
                store(node, me, keys, part=part)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            reserve(node, you, chunk_keys(3, 1))
            matched = match(node, me, keys, parts=[0, 1])
            assert len(matched.tiers) == 1  # three slots are left: one chunk and a half
            assert await load(node, you, keys, parts=[0, 1]) == 1
            assert node.counters.get("matches_cut_total", why="room") >= 1

        on_node(test, slots=6, tier=MemoryTier())

    def test_a_tier_with_another_order_learns_so_and_lets_it_be_replaced(self) -> None:
        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(1)
            store(node, me, keys)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            assert match(node, you, keys, orders=[OTHER]).lease == 0
            assert store(node, you, keys, order=OTHER, nbytes=2 * RAW) == 1
            await flush(node, you)
            await clear(node, me, tiers=["host"])
            assert match(node, me, keys).lease == 0
            assert owned(node).index.used_bytes == 12 * 1024 + 4096  # replaced, counted once
            assert len(match(node, you, keys, orders=[OTHER]).tiers) == 1

        on_node(test, tier=MemoryTier())

    def test_an_order_that_a_scan_could_not_know_fails_the_lease_once(self) -> None:
        tier = MemoryTier()

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(1)
            store(node, me, keys)
            await flush(node, me)
            backing = owned(node)
            backing.index.amend(keys[0], 0, SLOT)  # as after a scan
            await clear(node, me, tiers=["host"])
            matched = match(node, me, keys, orders=[OTHER])
            assert len(matched.tiers) == 1
            assert (await arrive(node, me, matched.lease)).failed
            await clear(node, me, tiers=["host"])
            assert match(node, me, keys, orders=[OTHER]).lease == 0

        on_node(test, tier=tier)

    def test_a_failed_lease_can_never_be_read(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(1)
            store(node, me, keys)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            tier = owned(node).tier
            assert isinstance(tier, FaultyTier)
            tier.inject("read", Answer(Outcome.MISS))
            matched = match(node, me, keys, orders=["", ORDER])
            arrived = await arrive(node, me, matched.lease)
            assert (arrived.ready, arrived.failed) == (0, True)

        on_node(test, tier=FaultyTier(MemoryTier()))

    def test_a_corrupt_object_is_rejected_counted_a_miss_and_stored_again(
        self, tmp_path: Path
    ) -> None:
        tier = FaultyTier(DiskTier(tmp_path))
        tier.inject("write", FlipBit(bit=8 * 6000), times=1)

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(2)
            store(node, me, keys[:1])
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            assert await load(node, me, keys[:1]) == 0
            assert node.counters.get("corrupt_objects_total", tier="disk") == 1
            assert at_once(node.lookup(me, p.Lookup(1, keys[0], [0]))).tiers == b"\xff"
            await until(lambda: owned(node).index.used_bytes == 0)
            assert store(node, me, keys[:1]) == 1
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            assert await load(node, me, keys[:1]) == 1

        on_node(test, tier=tier)

    def test_an_object_of_a_later_release_is_left_alone_and_may_be_replaced(
        self, tmp_path: Path
    ) -> None:
        tier = FaultyTier(DiskTier(tmp_path))
        tier.inject("write", FlipBit(bit=8 * 8), times=1)  # version 3

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(2)
            store(node, me, keys[:1])
            await flush(node, me)
            (file,) = tmp_path.glob("objects/*/*.kvo")
            await clear(node, me, tiers=["host"])
            assert await load(node, me, keys[:1]) == 0
            assert node.counters.get("incompatible_objects_total", tier="disk") == 1
            assert node.counters.get("corrupt_objects_total", tier="disk") == 0
            assert file.exists()
            assert owned(node).index.used_bytes == SLOT, "it still counts"
            assert await load(node, me, keys[:1]) == 0
            assert node.counters.get("incompatible_objects_total", tier="disk") == 1, "not asked"
            assert at_once(node.lookup(me, p.Lookup(1, keys[0], [0]))).tiers == b"\xff"
            assert store(node, me, keys[:1]) == 1
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            assert await load(node, me, keys[:1]) == 1

        on_node(test, tier=tier)

    def test_a_full_tier_takes_no_writes_and_still_reads(self) -> None:
        clock = ManualClock()
        tier = FaultyTier(MemoryTier())

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(2)
            store(node, me, keys)
            await flush(node, me)
            tier.inject("write", Raise(TierFull("no space left")), times=1)
            store(node, me, chunk_keys(1, 1))
            await flush(node, me)
            assert owned(node).state == "read only: no space left"
            store(node, me, chunk_keys(1, 2))
            assert node.counters.get("write_behind_skipped_total", tier="memory", why="tier") == 1
            await clear(node, me, tiers=["host"])
            assert await load(node, me, keys) == 2
            clock.advance(1.0)
            store(node, me, chunk_keys(1, 3))
            await flush(node, me)
            assert at_once(node.lookup(me, p.Lookup(1, chunk_keys(1, 3)[0], [0]))).tiers == b"\0"
            assert chunk_keys(1, 3)[0] in owned(node).index

        on_node(test, tier=tier, clock=clock)

    def test_a_read_only_tier_is_never_written_and_says_so(self) -> None:
        class ReadOnly(MemoryTier):
            read_only_reason = "mounted read only"

        clock = ManualClock()

        async def test(node: Node) -> None:
            me = Client(ME)
            await asyncio.sleep(0.05)  # the scan ends
            for _ in range(2):
                assert owned(node).state == "read only: mounted read only"
                store(node, me, chunk_keys(1))
                await flush(node, me)
                clock.advance(1000.0)
            assert node.counters.get("write_behind_skipped_total", tier="memory", why="tier") == 1
            assert node.counters.get("tier_trips_total", tier="memory") == 0
            assert owned(node).index.num_objects == 0

        on_node(test, tier=ReadOnly(), clock=clock)

    @pytest.mark.bugs
    @pytest.mark.parametrize("error", [TierUnavailable("gone"), ValueError("a bug")])
    @pytest.mark.parametrize("verb", ["read", "write", "delete", "clear", "touch"])
    def test_a_tier_that_dies_or_has_a_bug_costs_misses_only(
        self, verb: Any, error: Exception
    ) -> None:
        clock = ManualClock()
        tier = FaultyTier(MemoryTier())

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(2)
            store(node, me, keys)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            tier.inject(verb, Raise(error), times=2)
            if verb == "read":
                assert await load(node, me, keys) == 0
            elif verb == "write":
                store(node, me, chunk_keys(2, 1))
                await flush(node, me)
                assert chunk_keys(2, 1)[1] not in owned(node).index
            elif verb == "touch":
                await load(node, me, keys)
                await owned(node).upkeep()
            else:
                with pytest.raises(TierUnavailable):
                    await clear(node, me, None if verb == "clear" else keys)
            assert owned(node).state.startswith("off")
            node.check_integrity()
            bugs = node.counters.get("bugs_total", where="tier memory")
            assert (bugs > 0) == isinstance(error, ValueError)
            tier.heal()
            await until(lambda: not node.movement.filling())  # or time would pass for a read
            clock.advance(100.0)
            store(node, me, chunk_keys(2, 2))
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            assert await load(node, me, chunk_keys(2, 2)) == 2
            assert await clear(node, me, chunk_keys(2, 2)) == 4

        on_node(test, tier=tier, clock=clock)

    @pytest.mark.bugs
    def test_a_scan_that_fails_is_begun_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backoff_module, "FIRST_BACKOFF_S", 0.001)
        tier = FaultyTier(MemoryTier())

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            store(node, me, keys)
            await flush(node, me)
            for error in (TierUnavailable("gone"), ValueError("a bug")):
                tier.inject("scan", Raise(error), times=1)
                again = make_backing(tier)
                assert again.state == "scanning"
                await again.run()
                assert (again.state, again.index.num_objects) == ("ok", 3)

        on_node(test, tier=tier)

    def test_what_cannot_be_deleted_stays_counted_and_is_tried_again(self) -> None:
        clock = ManualClock()
        inner = GatedTier()
        tier = FaultyTier(inner)

        async def test(node: Node) -> None:
            me, index = Client(ME), owned(node).index
            store(node, me, chunk_keys(3))
            await flush(node, me)
            tier.inject("delete", Answer(Outcome.FAILED))
            for prompt in range(1, 6):
                store(node, me, chunk_keys(1, prompt))
                await flush(node, me)
                assert inner.held == index.used_bytes == 3 * SLOT
                clock.advance(100.0)
            tier.heal()
            store(node, me, chunk_keys(2, 9))
            await flush(node, me)
            assert inner.held == index.used_bytes <= 3 * SLOT
            assert index.claimed_bytes == 0

        on_node(test, slots=20, tier=tier, tier_slots=3, clock=clock)

    def test_writes_wait_for_the_scan(self) -> None:
        async def test(node: Node) -> None:
            backing, keys = make_backing(MemoryTier()), chunk_keys(1)
            store(node, Client(ME), keys)
            view = node.host.pool.view(node.host.get(keys[0], 0).offset, SLOT)  # type: ignore[union-attr]
            writing = asyncio.ensure_future(backing.write(keys[0], view, Origin([], 0, ORDER)))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not writing.done()
            await backing.run()
            assert await writing
            backing.close()

        on_node(test)

    def test_a_smaller_budget_than_last_time(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(8)
            store(node, me, keys)
            await flush(node, me)
            small = make_backing(tier, 3)
            await small.run()
            assert tier.held == small.index.used_bytes == 3 * SLOT
            assert [key in small.index for key in keys] == [True] * 3 + [False] * 5
            small.check_integrity()
            small.check_contents()
            await clear(node, me)

        on_node(test, tier=tier, num_threads=1)


class TestDeadlines:
    def test_a_promotion_past_its_deadline(self) -> None:
        clock = ManualClock()
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, keys, backing = Client(ME), chunk_keys(4), owned(node)
            store(node, me, keys)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            tier.shut("read")
            matched = match(node, me, keys)
            await until(lambda: tier.waiting == 2)
            clock.advance(1.0)
            arrived = await arrive(node, me, matched.lease)
            assert (arrived.ready, arrived.failed) == (0, True)
            assert backing.state.startswith("off: no read has ended for")
            release(node, me, matched.lease)
            # What no thread has touched is free; the others stay withheld until they come back.
            await until(lambda: not node.movement.filling())
            assert node.host.allocated_bytes == 2 * SLOT
            node.check_integrity()
            assert match(node, me, keys).lease == 0
            tier.open()
            await until(lambda: node.host.allocated_bytes == 0)
            assert match(node, me, keys).lease == 0  # still off
            clock.advance(1.0)
            assert await load(node, me, keys) == 4
            assert backing.state == "ok"

        on_node(test, tier=tier, clock=clock, deadline_s=0.01)

    def test_progress_counts_not_the_length_of_the_queue(self) -> None:
        clock = ManualClock()
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(6)
            store(node, me, keys)
            await flush(node, me)
            await clear(node, me, tiers=["host"])

            class Ticking(type(tier.gates["read"])):  # type: ignore[misc]
                def wait(self, timeout: float | None = None) -> bool:
                    clock.advance(0.4)
                    return True

            tier.gates["read"] = Ticking()
            assert await load(node, me, keys) == 6  # 2.4 s in all, a deadline of 1 s

        on_node(test, tier=tier, clock=clock, deadline_s=1.0, num_threads=1)

    def test_a_read_that_is_stuck_costs_its_thread_and_not_the_tier(self) -> None:
        clock, stuck = ManualClock(), threading.Event()

        class Sticky(MemoryTier):
            def read(self, ids: Any, into: Any) -> Any:
                if ids[0][:32] == chunk_keys(1)[0]:
                    stuck.wait()
                return super().read(ids, into)

        async def test(node: Node) -> None:
            me, keys, others = Client(ME), chunk_keys(1), chunk_keys(3, 1)
            store(node, me, keys)
            store(node, me, others)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            matched = match(node, me, keys)
            await asyncio.sleep(0.05)
            clock.advance(1.0)
            assert (await arrive(node, me, matched.lease)).failed
            assert not owned(node).readable
            # However long it stays so, the others are read.
            clock.advance(100.0)
            assert await load(node, me, others) == 3
            assert owned(node).state == "ok"
            assert node.counters.get("tier_trips_total", tier="memory") == 1
            stuck.set()

        on_node(test, tier=Sticky(), clock=clock, deadline_s=0.5, num_threads=2)

    def test_a_late_miss_does_not_forget_the_object_that_replaced_it(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(1)
            backing = owned(node)
            store(node, me, keys)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            tier.shut("read")
            matched = match(node, me, keys)
            await until(lambda: tier.waiting == 1)
            # Another engine stores the chunk in its own order, and of another size.
            store(node, you, keys, order="other/order", nbytes=2 * RAW)
            await flush(node, you)
            before = backing.index.used_bytes
            tier._objects.move_to_end(identity(keys[0], 0))
            tier.open()
            await until(lambda: not node.movement.filling())
            assert backing.index.used_bytes == before > 0
            assert keys[0] in backing.index
            release(node, me, matched.lease)

        on_node(test, tier=tier, slots=20)

    def test_backoff_grows_and_ends(self) -> None:
        clock = ManualClock()
        backing = make_backing(MemoryTier(), clock=clock)
        for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
            for _ in range(5):
                backing.trip(TierUnavailable("again"))
            assert not backing.readable
            clock.advance(seconds - 0.5)
            assert not backing.readable
            clock.advance(0.5)
            assert backing.readable
        backing.close()


class TestLongMessages:
    @pytest.mark.parametrize("more", [{"owner": bytes(16)}, {"before_ns": 1}])
    def test_a_clear_of_many_keys_of_an_owner_lets_others_be_served(
        self, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            store(node, me, keys)
            clearer, looked = node.tenants.clearing._clearer, 0
            may_be = clearer._may_be_covered

            def look(key: bytes, mark: Mark) -> bool:
                nonlocal looked
                looked += 1
                return may_be(key, mark)

            monkeypatch.setattr(clearer, "_may_be_covered", look)
            monkeypatch.setattr(slices, "HOLD_S", 0.0)
            packed = b"".join([*(bytes([1]) * 31 + bytes([n]) for n in range(256)), *keys])
            answer = node.clear(me, p.Clear(1, packed, [], **more))
            assert looked < len(packed) // 32, "the rest has to wait"
            await answer
            assert looked == len(packed) // 32
            assert len(match(node, me, keys).tiers) == (3 if "before_ns" in more else 0)

        on_node(test)

    def test_the_heads_of_an_explanation_are_few(self) -> None:
        async def test(node: Node) -> None:
            asked = p.Explain(1, keys=b"".join(chunk_keys(1)), heads=bytes(16) * 9)
            with pytest.raises(UsageError, match="144 bytes are no heads; 16 each, 8 at most"):
                await node.handle(Client(ME), asked)  # type: ignore[misc]

        on_node(test)


class TestRecords:
    @pytest.mark.parametrize("key", ["zz", [1]])
    def test_one_whose_first_key_is_none_cannot_be_explained(self, key: Any) -> None:
        async def test(node: Node) -> None:
            me = Client(ME)
            node.record(me, p.Record({"request": "r", "first_key": key}))
            told = node.handle(me, p.Explain(1, "r"))
            assert isinstance(told, p.Explained)
            assert told.record["first_key"] == key
            with pytest.raises(UsageError, match="the first key of 'r' is none"):
                node.handle(me, p.Explain(1, "r", across=True))

        on_node(test)

    def test_a_record_is_small_and_outcomes_are_few(self) -> None:
        async def test(node: Node) -> None:
            me = Client(ME)
            deep: dict[str, Any] = {}
            for _ in range(5000):
                deep = {"a": deep}
            for record in ({"x": "y" * 10_000}, deep):
                with pytest.raises(UsageError, match="record"):
                    node.record(me, p.Record(record))
            for other in (b"\xff", msgspec.msgpack.Ext(5, b"abc"), {b"k": 1}, {1: 2}, TIME):
                wire = msgspec.msgpack.encode(p.Record({"x": [{"y": other}]}))
                read = p.decode_request(wire)
                assert isinstance(read, p.Record)
                with pytest.raises(UsageError, match=r"a record (is JSON|has text)"):
                    node.record(me, read)
            for number in range(100):
                node.record(me, p.Record({"outcome": f"made up {number}"}))
            assert len(node.records) == 100
            labels = [name for name in node.counters.snapshot() if name.startswith("requests_t")]
            assert len(labels) == 33
            assert node.counters.get("requests_total", outcome="other") == 68

        on_node(test)


class TestThreads:
    def test_without_a_thread_nothing_is_queued(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads, calls = Threads(2, "test"), []

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError):
                threads.submit(lambda: calls.append(1))
        threads.submit(lambda: calls.append(2)).result(10)
        gate = threading.Event()
        busy = threads.submit(gate.wait)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            queued = threads.submit(lambda: calls.append(3))
        gate.set()
        busy.result(10)
        queued.result(10)
        assert calls == [2, 3]
        threads.close()


class TestClear:
    def test_what_a_clear_forgot_is_not_promoted_any_more(self) -> None:
        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(3)
            for wanted in (None, keys):
                store(node, me, keys)
                await flush(node, me)
                await clear(node, me, tiers=["host"])
                packed = None if wanted is None else b"".join(wanted)
                answer = node.clear(me, p.Clear(1, packed, []))
                # Somebody asks before the tier has done its part.
                assert match(node, you, keys).lease == 0
                assert isinstance(answer, Awaitable)
                done = await answer
                assert isinstance(done, p.Done)
                assert done.count == 3
                assert match(node, you, keys).lease == 0

        on_node(test, tier=MemoryTier())

    def test_a_clear_that_fails_during_a_scan_leaves_nothing_uncounted(self) -> None:
        gated = GatedTier()
        tier = FaultyTier(gated)

        async def test(node: Node) -> None:
            me, backing = Client(ME), owned(node)
            entered = asyncio.Event()
            make_room = backing._make_room

            async def slow(nbytes: int) -> bool:
                entered.set()
                await asyncio.sleep(0.05)
                return await make_room(nbytes)

            backing._make_room = slow  # type: ignore[method-assign]
            backing.index.adopt = lambda found: False  # type: ignore[method-assign]
            await entered.wait()
            del backing.index.adopt
            tier.inject("clear", Raise(TierUnavailable("no epoch")), times=1)
            with pytest.raises(TierUnavailable):
                await clear(node, me)
            await until(lambda: backing.state != "scanning" and backing._scan.done)
            assert backing.index.num_objects == 0
            await until(lambda: backing.index.used_bytes == gated.held)

        async def fill() -> None:
            node = make_node(tier=tier)
            await node.start()
            store(node, Client(ME), chunk_keys(3))
            await flush(node, Client(ME))
            tier.close = lambda: None  # type: ignore[method-assign]
            await node.stop()

        asyncio.run(fill())
        on_node(test, tier=tier, clock=ManualClock())

    def test_commit_after_clear_publishes_nothing(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            for cleared in (None, keys[1:]):
                number, offsets = reserve(node, me, keys)
                sums = write(node, keys, offsets)
                await clear(node, me, cleared)
                count = at_once(node.commit(me, p.Commit(1, number, b"".join(sums)))).count
                assert count == (0 if cleared is None else 1)
                await flush(node, me)
                assert len(owned(node).index) == count
            assert len(match(node, me, keys).tiers) == 1

        on_node(test, tier=MemoryTier())

    def test_a_promotion_that_arrives_after_clear_publishes_nothing(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(2)
            for cleared in (None, keys):
                store(node, me, keys)
                await flush(node, me)
                await clear(node, me, tiers=["host"])
                tier.shut("read")
                matched = match(node, me, keys)
                await until(lambda: tier.waiting == 2)
                await clear(node, me, cleared)
                tier.open()
                assert (await arrive(node, me, matched.lease)).failed
                release(node, me, matched.lease)
                assert match(node, me, keys).lease == 0
                await until(lambda: node.host.allocated_bytes == 0)
                assert tier.held == 0

        on_node(test, tier=tier)

    @pytest.mark.parametrize("everything", [True, False])
    def test_who_asks_after_a_clear_does_not_share_what_it_has_forgotten(
        self, everything: bool
    ) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, you, keys = Client(ME), Client(YOU), chunk_keys(2)
            store(node, me, keys)
            await flush(node, me)
            await clear(node, me, tiers=["host"])
            tier.shut("read")
            forgotten = match(node, me, keys)
            await until(lambda: tier.waiting == 2)
            await clear(node, me, None if everything else keys, ["host"])
            loading = asyncio.ensure_future(load(node, you, keys))
            await asyncio.sleep(0)
            tier.open()
            assert await loading == 2
            assert (await arrive(node, me, forgotten.lease)).failed

        on_node(test, tier=tier)

    @pytest.mark.parametrize("everything", [True, False])
    @pytest.mark.parametrize("tiers", [[], ["memory"]])
    def test_a_write_that_a_clear_overtakes_leaves_nothing(
        self, everything: bool, tiers: list[str]
    ) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(5)
            tier.shut("write")
            store(node, me, keys)
            await until(lambda: tier.waiting == 2)  # two under way, three queued
            clearing = asyncio.ensure_future(clear(node, me, None if everything else keys, tiers))
            await asyncio.sleep(0)
            assert tier.waiting == 2
            tier.open()
            await clearing
            await flush(node, me)
            assert tier.held == owned(node).index.used_bytes == 0
            assert len(match(node, me, keys).tiers) == (5 if tiers else 0)

        on_node(test, tier=tier)

    def test_what_is_cleared_while_the_scan_runs_does_not_come_back(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(4)
            store(node, me, keys)
            await flush(node, me)
            later = make_backing(tier)
            dropping = asyncio.ensure_future(later.drop(keys[:2]))
            nothing = asyncio.ensure_future(later.drop(chunk_keys(1, 1)))
            for _ in range(20):
                await asyncio.sleep(0)
            # A process that is killed now leaves them to the next one.
            assert not dropping.done()
            await later.run()
            assert await dropping == 2
            assert await nothing == 0
            assert [key in later.index for key in keys] == [False, False, True, True]
            assert tier.held == 2 * SLOT
            later.check_integrity()
            later.check_contents()

        on_node(test, tier=tier)

    def test_what_a_scan_that_fails_has_not_found_cannot_be_cleared(self) -> None:
        inner = GatedTier()
        tier = FaultyTier(inner)

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(2)
            store(node, me, keys)
            await flush(node, me)
            clock = ManualClock()
            later = make_backing(tier, clock=clock)
            tier.inject("scan", Raise(TierUnavailable("gone")), times=1)
            dropping = asyncio.ensure_future(later.drop(keys))
            scanning = asyncio.ensure_future(later.run())
            with pytest.raises(TierUnavailable, match="may be there again"):
                await dropping
            clock.advance(100)
            await scanning
            assert not any(key in later.index for key in keys)
            assert not inner.held
            later.check_integrity()

        on_node(test, tier=tier)

    def test_a_clear_that_fails_says_so_and_serves_nothing(self) -> None:
        clock = ManualClock()
        inner = GatedTier()
        tier = FaultyTier(inner)

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            store(node, me, keys)
            await flush(node, me)
            tier.inject("clear", Raise(TierUnavailable("gone")), times=1)
            with pytest.raises(TierUnavailable, match="gone"):
                await clear(node, me)
            clock.advance(10)
            assert match(node, me, keys).lease == 0
            assert inner.held == owned(node).index.used_bytes == 3 * SLOT
            await clear(node, me)
            store(node, me, keys)
            await flush(node, me)
            assert await load(node, me, keys) == 3
            assert owned(node).index.used_bytes - owned(node).index.claimed_bytes == (inner.held)

        on_node(test, tier=tier, clock=clock)

    def test_the_next_client_stores_again(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            for _ in range(3):
                assert store(node, me, keys) == 3
                await flush(node, me)
                assert await clear(node, me) == 6
            assert node.host.allocated_bytes == owned(node).index.used_bytes == 0

        on_node(test, tier=MemoryTier())


class TestWriteBehind:
    def test_flush_waits_for_what_was_committed_and_no_longer(self) -> None:
        turns = threading.Semaphore(0)

        class OneByOne(MemoryTier):
            def write(self, puts: Any) -> Any:
                assert turns.acquire(timeout=30)
                return super().write(puts)

        async def test(node: Node) -> None:
            me = Client(ME)
            store(node, me, chunk_keys(3))
            first = asyncio.ensure_future(flush(node, me))
            await asyncio.sleep(0)
            store(node, me, chunk_keys(3, 1))
            turns.release(2)
            await until(lambda: owned(node).index.num_objects == 2)
            assert not first.done()
            turns.release(1)
            await first
            later = asyncio.ensure_future(flush(node, me))
            await asyncio.sleep(0)
            assert not later.done()
            turns.release(3)
            await later
            assert owned(node).index.num_objects == 6

        on_node(test, tier=OneByOne(), num_threads=1)

    def test_a_full_queue_skips_the_tail(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(5)
            tier.shut("write")
            store(node, me, keys)
            tier.open()
            await flush(node, me)
            assert [key in owned(node).index for key in keys] == [True] * 3 + [False] * 2
            skipped = node.counters.get("write_behind_skipped_total", tier="memory", why="queue")
            assert skipped == 2

        on_node(test, tier=tier, queue_slots=3)

    def test_stop_drains(self) -> None:
        written: list[bytes] = []

        class Recorder(MemoryTier):
            def write(self, puts: Any) -> Any:
                written.extend(put.object_id for put in puts)
                return super().write(puts)

        async def main() -> None:
            node = make_node(tier=Recorder())
            await node.start()
            store(node, Client(ME), chunk_keys(4))
            await node.stop()
            assert len(asyncio.all_tasks()) == 1, "tasks were left behind"

        asyncio.run(main())
        assert len(written) == 4

    def test_stop_does_not_wait_for_a_hung_tier(self) -> None:
        tier = GatedTier()

        async def main() -> None:
            node = make_node(tier=tier)
            await node.start()
            tier.shut("write")
            store(node, Client(ME), chunk_keys(4))
            await until(lambda: tier.waiting == 2)
            await asyncio.wait_for(node.stop(drain_s=0.01), 10)
            assert len(asyncio.all_tasks()) == 1

        asyncio.run(main())
        tier.open()


class TestSampling:
    def test_a_flipped_bit_in_host_memory_is_found_counted_and_dropped(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(3)
            store(node, me, keys)
            offset = node.host.get(keys[1], 0).offset  # type: ignore[union-attr]
            node.host.pool.view(offset + HEADER_BYTES + 77, 1)[0] ^= 4
            matched = match(node, me, keys)
            await until(lambda: node.counters.get("corrupt_objects_total", tier="host") == 1)
            release(node, me, matched.lease)
            assert node.host.get(keys[1], 0) is None
            assert len(match(node, me, keys).tiers) == 1
            await until(lambda: node.counters.get("verified_objects_total", tier="host") == 3)
            assert store(node, me, keys) == 1

        on_node(test, verify_every=1)

    def test_a_flipped_version_too(self) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(1)
            store(node, me, keys)
            offset = node.host.get(keys[0], 0).offset  # type: ignore[union-attr]
            for i in range(8, 16):
                node.host.pool.view(offset + i, 1)[0] ^= 0x40
            match(node, me, keys)
            await until(lambda: node.counters.get("corrupt_objects_total", tier="host") == 1)

        on_node(test, verify_every=1)

    @pytest.mark.parametrize(("every", "least", "most"), [(0, 0, 0), (1, 400, 400), (8, 25, 100)])
    def test_one_in_so_many(self, every: int, least: int, most: int) -> None:
        async def test(node: Node) -> None:
            me, keys = Client(ME), chunk_keys(4)
            store(node, me, keys)
            for _ in range(100):
                release(node, me, match(node, me, keys).lease)
            await until(lambda: not len(node._sampler._tasks))
            assert least <= node.counters.get("verified_objects_total", tier="host") <= most

        on_node(test, verify_every=every)


class TestInProcess:
    def test_the_same_through_a_client(self, tmp_path: Path) -> None:
        overrides = {
            "host.capacity": "1MiB",
            "secret_file": str(tmp_path / "secret"),
            "disk.path": str(tmp_path / "disk"),
            "disk.capacity": "1MiB",
        }
        config = load_config(environ={}, overrides=overrides)
        keys = chunk_keys(3)
        secrets = set()
        for turn in range(2):
            with InProcessNode(config) as node:
                client = node.connect()
                secrets.add(client.hello.secret)
                if turn == 0:
                    reserved = client.reserve(NAMESPACE, keys, 0, 0, template()).wait(5)
                    sums = write(node.node, keys, offsets_of(reserved.offsets))
                    assert client.commit(reserved.reservation, sums).wait(5).count == 3
                    client.flush()
                else:
                    while client.status()["tiers"][0]["state"] == "scanning":
                        pass
                matched = client.match(keys, [0], [ORDER], [RAW]).wait(5)
                assert list(matched.tiers) == [turn] * 3
                offsets, ready = offsets_of(matched.offsets), 0
                while ready < 3:
                    arrived = client.await_arrival(matched.lease, ready).wait(5)
                    offsets[ready : arrived.ready] = offsets_of(arrived.offsets)
                    ready = arrived.ready
                for key, offset in zip(keys, offsets, strict=True):
                    assert bytes(client.pool.view(offset + HEADER_BYTES, RAW)) == payload(key)
                client.release(matched.lease)
                assert client.status()["leases"]["bytes"] == 0
                node.check_integrity()
                client.close()
            node.close()
        assert len(secrets) == 1, "after a restart no key would be found"

    def test_a_node_that_cannot_be_made_says_why(self, tmp_path: Path) -> None:
        overrides = {"host.capacity": "1MiB", "secret_file": str(tmp_path / "secret")}
        config = load_config(environ={}, overrides=overrides)

        def make(config: Any) -> Node:
            raise TierUnavailable("no memory")

        with pytest.raises(TierUnavailable, match="no memory"):
            InProcessNode(config, make)

    def test_it_checks_the_laws_and_closes_more_than_once(self, tmp_path: Path) -> None:
        config = load_config(environ={}, overrides={"secret_file": str(tmp_path / "secret")})
        node = InProcessNode(config, lambda _: make_node())
        node.check_integrity()
        node.node.host.index.num_objects += 1
        with pytest.raises(AssertionError):
            node.check_integrity()
        for _ in range(2):
            node.close()
            assert not node._thread.is_alive(), "it is still writing behind"
