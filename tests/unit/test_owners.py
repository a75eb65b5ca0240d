"""Whose chunks are, quotas and pins: in host memory, in a tier of the node's own, over restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from benchmarks.tenants.run import storm
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    RAW,
    SLOT,
    GatedTier,
    at_once,
    chunk_keys,
    clear,
    flush,
    load,
    make_backing,
    on_node,
    owned,
    payload,
    store,
    template,
    until,
    write,
)

from kvstrata.config import Config, HostConfig, LeaseConfig, PinConfig
from kvstrata.errors import TierUnavailable, UsageError
from kvstrata.memory.pool import Pool
from kvstrata.node.common import index as index_module
from kvstrata.node.common.slices import Work
from kvstrata.node.node import Node
from kvstrata.node.operating import quotas
from kvstrata.node.service.ledger import Ledger
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.observe.counters import Counters
from kvstrata.testing.clock import ManualClock
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.tiers.faulty import FaultyTier
from kvstrata.tiers.journal import Journal
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

ANNA, BERT = b"a" * 16, b"b" * 16


class Telling(GatedTier):
    """A tier whose objects, and journal, outlive the node."""

    def close(self) -> None:
        pass


class Lasting(Telling):
    """The same, with headers that cannot be read by themselves."""

    def headers(self, ids: Sequence[bytes]) -> list[bytes | Outcome]:
        return [Outcome.FAILED] * len(ids)


def client() -> Client:
    return Client("pid 1")


def keep(
    node: Node,
    keys: Sequence[bytes],
    owner: bytes,
    *,
    namespace: bytes = NAMESPACE,
    prefix: Sequence[bytes] = (),
) -> int:
    """Store chunks for an owner; how many got a slot."""
    me = client()
    whole = [*prefix, *keys]
    message = p.Reserve(1, namespace, b"".join(whole), len(prefix), 0, template(), 0.0, "", owner)
    reserved = at_once(node.reserve(me, message))
    sums = []
    for key, offset in zip(keys, offsets_of(reserved.offsets), strict=True):
        if offset >= 0:
            node.host.pool.view(offset + HEADER_BYTES, RAW)[:] = payload(key, 0, ORDER)
        sums.append(checksum(payload(key, 0, ORDER)))
    commit = p.Commit(1, reserved.reservation, b"".join(sums))
    return at_once(node.commit(me, commit)).count


async def pin(
    node: Node, keys: Sequence[bytes], owner: bytes = ANNA, name: str = "a", ttl_s: float = 60.0
) -> p.Pinned:
    pinned: p.Pinned = await answer(node, p.Pin(1, b"".join(keys), owner, name, ttl_s))
    return pinned


async def quota(node: Node, owner: bytes, tier: str, slots: int | None) -> int:
    nbytes = None if slots is None else slots * SLOT
    done: p.Done = await answer(node, p.Quota(1, owner, tier, nbytes))
    return done.count


async def answer(node: Node, message: Any) -> Any:
    reply = node.handle(client(), message)
    return await reply if isinstance(reply, Awaitable) else reply


def there(node: Node, keys: Sequence[bytes], tier: int = 0) -> list[int]:
    """Numbers of the chunks that a tier has: 0 host memory, 1 and up the slower ones."""
    index: Any = node.host.index if not tier else owned(node, tier - 1).index
    return [number for number, key in enumerate(keys) if key in index]


def held(node: Node, owner: bytes, tier: int = 0) -> int:
    index: Any = node.host.index if not tier else owned(node, tier - 1).index
    nbytes: int = sum(one.nbytes for one in index.owners if one.owner == owner)
    return nbytes // SLOT


def with_tier(
    tier: Any,
    slots: int = 8,
    tier_slots: int = 20,
    pins: tuple[float, float] = (0.5, 0.5),
    journal: Journal | None = None,
    clock: Any = time.monotonic,
) -> Node:
    counters = Counters()
    config = Config(
        host=HostConfig(capacity=slots * SLOT),
        leases=LeaseConfig(Fraction(1), Fraction(1)),
        pins=PinConfig(Fraction(pins[0]), Fraction(pins[1])),
    )
    backings: Any = [] if tier is None else [make_backing(tier, tier_slots, counters=counters)]
    pool = Pool.create(slots * SLOT)
    return Node(config, pool, backings, counters, clock=clock, journal=journal)


def run(node: Node, test: Any) -> None:
    async def main() -> None:
        await node.start()
        try:
            await asyncio.wait_for(test(node), 30)
            node.check_integrity(contents=True)
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())


def test_a_storm_of_tenants(tmp_path: Path) -> None:
    """The benchmark's, in short; of a real node over its socket, with a disk."""
    lost, beyond, counts = storm(tmp_path, 30, seed=1)
    assert (lost, beyond) == (0, 0)
    assert counts["evicted"] > 0
    assert counts['evicted_chunks_total{tier="disk"}'] > 0


class TestWhose:
    def test_bytes_of_each_owner_are_known_in_every_tier(self) -> None:
        async def test(node: Node) -> None:
            anna, bert = chunk_keys(3, 1), chunk_keys(2, 2)
            keep(node, anna, ANNA)
            keep(node, bert, BERT)
            await flush(node, client())
            for tier in (0, 1):
                assert (held(node, ANNA, tier), held(node, BERT, tier)) == (3, 2)
            assert node.host.index.whose(anna[0]) == (ANNA, NAMESPACE)
            state = at_once(node.status(client(), p.Status(1))).state
            shown = state["tiers"][0]["owners"]
            assert [(one["owner"], one["bytes"]) for one in shown] == [
                (ANNA.hex(), 3 * SLOT), (BERT.hex(), 2 * SLOT)
            ]  # fmt: skip
            await clear(node, client(), anna)
            assert (held(node, ANNA), held(node, ANNA, 1), held(node, BERT, 1)) == (0, 0, 2)

        on_node(test, slots=10, tier=GatedTier())

    @pytest.mark.parametrize("headers", [True, False])
    def test_what_a_scan_found_is_known_once_it_was_read(self, headers: bool) -> None:
        """In the background, or when it is loaded."""
        tier, keys = Telling() if headers else Lasting(), chunk_keys(3)

        async def first(node: Node) -> None:
            keep(node, keys, ANNA)
            await flush(node, client())

        async def second(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            assert there(node, keys, 1) == [0, 1, 2]
            if headers:
                await until(lambda: held(node, ANNA, 1) == 3)
                return
            assert held(node, ANNA, 1) == 0
            assert await load(node, client(), keys[:2]) == 2
            assert (held(node, ANNA, 1), held(node, ANNA)) == (2, 2)

        run(with_tier(tier), first)
        run(with_tier(tier), second)

    def test_of_many_owners_the_greatest_are_named(self) -> None:
        async def test(node: Node) -> None:
            for number in range(40):
                keep(node, chunk_keys(1, number), bytes([number + 1]) * 16)
            keep(node, chunk_keys(3, 99), ANNA)
            shown = node.host.index.owners.shown()
            assert len(shown) == 33
            assert (shown[0]["owner"], shown[-1]["owner"]) == (ANNA.hex(), "other")
            assert sum(one["bytes"] for one in shown) == 43 * SLOT
            assert sum(one["num_chunks"] for one in shown) == 43
            await clear(node, client())
            assert node.host.index.owners.shown() == []

        on_node(test, slots=50)


class TestQuotas:
    @pytest.mark.parametrize("policy", ["lru", "s3fifo", "cost"])
    def test_a_tenant_evicts_its_own_and_no_other(self, policy: str) -> None:
        async def test(node: Node) -> None:
            others, old, new = chunk_keys(4, 1), chunk_keys(3, 2), chunk_keys(3, 3)
            keep(node, others, BERT)
            await quota(node, ANNA, "host", 4)
            assert keep(node, old, ANNA) == 3
            assert keep(node, new, ANNA) == 3
            assert there(node, others) == [0, 1, 2, 3]
            assert there(node, new) == [0, 1, 2]
            assert held(node, ANNA) == 4
            if policy == "lru":
                assert there(node, old) == [0], "a tail goes before its head"

        on_node(test, slots=20, policy=policy)

    def test_what_cannot_fit_is_not_stored_and_counted(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(6)
            await quota(node, ANNA, "host", 4)
            assert keep(node, keys, ANNA) == 4
            assert there(node, keys) == [0, 1, 2, 3], "the head is what is kept"
            assert node.counters.get("over_quota_objects_total", tier="host") == 2
            assert await quota(node, BERT, "host", 0) == 0
            assert keep(node, chunk_keys(1, 1), BERT) == 0

        on_node(test, slots=20)

    def test_what_is_being_written_counts(self) -> None:
        async def test(node: Node) -> None:
            await quota(node, ANNA, "host", 3)
            me = client()
            for prompt, expected in ((1, 2), (2, 1)):
                keys = b"".join(chunk_keys(2, prompt))
                request = p.Reserve(1, NAMESPACE, keys, 0, 0, template(), 0.0, "", ANNA)
                offsets = offsets_of(at_once(node.reserve(me, request)).offsets)
                assert sum(offset >= 0 for offset in offsets) == expected
            node.check_integrity()
            node.end(me)
            assert keep(node, chunk_keys(3, 3), ANNA) == 3

        on_node(test, slots=20)

    def test_on_disk_too_and_heads_stay(self) -> None:
        async def test(node: Node) -> None:
            others, keys = chunk_keys(3, 1), chunk_keys(6, 2)
            keep(node, others, BERT)
            await quota(node, ANNA, "memory", 4)
            keep(node, keys, ANNA)
            await flush(node, client())
            assert there(node, keys, 1) == [0, 1, 2, 3]
            assert there(node, others, 1) == [0, 1, 2]
            await quota(node, BERT, "memory", 0)
            keep(node, chunk_keys(1, 3), BERT)
            await flush(node, client())
            assert there(node, others, 1) == []
            counted = node.counters.snapshot()
            assert counted['over_quota_objects_total{tier="memory"}'] == 1

        on_node(test, slots=20, tier=GatedTier(), num_threads=1)

    def test_what_is_promoted_counts_too(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(6)
            keep(node, keys, ANNA)
            await flush(node, client())
            await clear(node, client(), None, ["host"])
            await quota(node, ANNA, "host", 2)
            me = client()
            message = p.Match(1, b"".join(keys), [0], [ORDER], [RAW], ANNA)
            matched = at_once(node.match(me, message))
            assert len(matched.tiers) == 2
            node.end(me)
            # Who does not say for whom he asks gets no more either.
            assert await load(node, client(), keys) == 2
            assert held(node, ANNA) == 2

        on_node(test, slots=20, tier=GatedTier())

    def test_lowered_it_goes_at_once_but_what_is_leased(self) -> None:
        async def test(node: Node) -> None:
            keys, more = chunk_keys(3, 1), chunk_keys(3, 2)
            keep(node, keys, ANNA)
            keep(node, more, ANNA)
            me = client()
            at_once(node.match(me, p.Match(1, b"".join(keys), [0], [ORDER], [RAW])))
            assert await quota(node, ANNA, "host", 2) == 3 * SLOT
            assert there(node, keys) == [0, 1, 2]
            assert there(node, more) == []
            assert keep(node, more, ANNA) == 0
            node.end(me)
            assert keep(node, more, ANNA) == 2
            assert held(node, ANNA) == 2
            await quota(node, ANNA, "host", None)
            assert keep(node, chunk_keys(6, 3), ANNA) == 6

        on_node(test, slots=20)

    def test_several_that_are_set_at_once_miss_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def step_by_step(work: Work[None]) -> None:
            for _ in work:
                await asyncio.sleep(0)

        monkeypatch.setattr(quotas, "in_slices", step_by_step)
        monkeypatch.setattr(index_module, "SLICE", 2)

        async def test(node: Node) -> None:
            keep(node, chunk_keys(30, 1), ANNA)
            keep(node, chunk_keys(30, 2), BERT)
            sets = [quota(node, ANNA, "host", 50), quota(node, BERT, "host", 50)]
            setting = asyncio.gather(*sets, quota(node, ANNA, "host", 20))
            for number in range(3, 8):
                await asyncio.sleep(0)
                keep(node, chunk_keys(2, number), BERT)
            assert (await setting)[2] == 20 * SLOT
            assert [held(node, one) for one in (ANNA, BERT)] == [20, 40]
            for account in node.host.index.owners:
                assert account.policy is not None
                assert len(account.policy) == account.num_chunks
            # Of a prompt that was there before the quota the head stays.
            assert there(node, chunk_keys(30, 1)) == list(range(20))

        on_node(test, slots=120)

    def test_they_outlive_the_node(self) -> None:
        tier, journal = Lasting(), Journal()

        async def first(node: Node) -> None:
            await quota(node, ANNA, "memory", 2)
            await quota(node, ANNA, "host", 3)
            await quota(node, BERT, "host", 3)
            await quota(node, BERT, "host", None)

        async def second(node: Node) -> None:
            assert keep(node, chunk_keys(5), ANNA) == 3
            assert keep(node, chunk_keys(5, 1), BERT) == 5
            await flush(node, client())
            assert held(node, ANNA, 1) == 2

        run(with_tier(tier, journal=journal), first)
        run(with_tier(tier, journal=journal), second)

    @pytest.mark.parametrize(
        ("message", "says"),
        [
            (p.Quota(1, b"a", "host", 1), "an owner of 1 bytes"),
            (p.Quota(1, bytes(16), "host", 1), "nobody's"),
            (p.Quota(1, ANNA, "disk", 1), "no quota in 'disk'"),
            (p.Quota(1, ANNA, "host", -1), "no quota"),
        ],
    )
    def test_refused(self, message: p.Quota, says: str) -> None:
        async def test(node: Node) -> None:
            with pytest.raises(UsageError, match=says):
                await answer(node, message)

        on_node(test)


class TestPins:
    def test_a_storm_of_others_takes_nothing_that_is_pinned(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(4)
            keep(node, keys, ANNA)
            await flush(node, client())
            pinned = await pin(node, keys)
            assert (pinned.num_chunks, pinned.num_kept) == (4, 4)
            assert pinned.tiers == {"host": 0, "memory": 4}, "one tier that keeps it is enough"
            for prompt in range(1, 12):
                keep(node, chunk_keys(4, prompt), BERT)
                await flush(node, client())
            assert there(node, keys) == [], "it is demoted like any other"
            assert there(node, keys, 1) == [0, 1, 2, 3]
            assert await load(node, client(), keys) == 4

        run(with_tier(GatedTier(), slots=8, tier_slots=10), test)

    def test_where_there_is_host_memory_alone_it_keeps_them(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(4)
            keep(node, keys, ANNA)
            assert (await pin(node, keys)).tiers == {"host": 4}
            for prompt in range(1, 5):
                keep(node, chunk_keys(5, prompt), BERT)
            assert there(node, keys) == [0, 1, 2, 3]
            assert await answer(node, p.Unpin(1, ANNA, "a")) == p.Done(1, 4)
            assert await answer(node, p.Unpin(1, ANNA, "a")) == p.Done(1, 0)
            keep(node, chunk_keys(8, 9), BERT)
            assert there(node, keys) == []

        run(with_tier(None), test)

    def test_host_memory_keeps_them_until_a_slower_tier_does(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            keys = chunk_keys(4)
            tier.shut("write")
            keep(node, keys, ANNA)
            assert (await pin(node, keys)).tiers == {"host": 4, "memory": 0}
            tier.open()
            await flush(node, client())
            assert (await pin(node, keys)).tiers == {"host": 0, "memory": 4}
            await clear(node, client(), None, ["memory"])
            await until(lambda: len(node.host.index.pinned) == 4)

        run(with_tier(tier), test)

    def test_host_memory_keeps_a_chunk_of_which_a_slower_tier_lacks_a_part(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            keys = chunk_keys(2)
            store(node, client(), keys)
            await flush(node, client())
            assert (await pin(node, keys)).tiers == {"host": 0, "memory": 2}
            tier.shut("write")
            store(node, client(), keys, part=1)
            await until(lambda: len(node.host.index.pinned) == 2)
            tier.open()
            await flush(node, client())
            await until(lambda: not len(node.host.index.pinned))

        run(with_tier(tier), test)

    def test_what_comes_later_is_kept_too(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(3)
            assert (await pin(node, keys)).num_kept == 0
            keep(node, keys, ANNA)
            await flush(node, client())
            assert (await pin(node, keys)).num_kept == 3

        run(with_tier(GatedTier()), test)

    def test_pins_never_fill_a_tier(self) -> None:
        async def test(node: Node) -> None:
            anna, bert = chunk_keys(4, 1), chunk_keys(4, 2)
            keep(node, anna, ANNA)
            keep(node, bert, BERT)
            first, second = await pin(node, anna, ANNA), await pin(node, bert, BERT)
            assert (first.num_kept, second.num_kept) == (3, 2), "3 of an owner, 5 in all"
            pinned = node.host.index.pinned
            assert [key in pinned for key in anna] == [True, True, True, False], "the head is kept"
            assert keep(node, chunk_keys(7, 3), BERT) == 7
            assert there(node, anna) == [0, 1, 2]

        run(with_tier(None, slots=12, pins=(0.25, 0.42)), test)

    def test_a_chunk_of_two_owners_counts_against_one_who_has_room_for_it(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(8)
            keep(node, keys, ANNA)
            assert (await pin(node, keys, ANNA)).num_kept == 5, "a quarter of the tier"
            assert (await pin(node, keys[3:], BERT)).num_kept == 5
            page = await answer(node, p.Pins(1))
            assert sorted(one.num_kept for one in page.pins) == [5, 8]
            await answer(node, p.Unpin(1, ANNA, "a"))
            page = await answer(node, p.Pins(1))
            assert [one.num_kept for one in page.pins] == [5]

        run(with_tier(None, slots=20, pins=(0.25, 0.5)), test)

    def test_a_key_given_twice_counts_once(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(2)
            keep(node, keys, ANNA)
            assert (await pin(node, [*keys, *keys, keys[0]])).num_chunks == 2
            page = await answer(node, p.Pins(1))
            assert [(one.num_chunks, one.num_kept) for one in page.pins] == [(2, 2)]

        run(with_tier(None), test)

    def test_they_end_by_time_and_repeating_renews(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(2)
            keep(node, keys, ANNA)
            wall = ManualClock()
            node.tenants.pinning._wall = wall
            await pin(node, keys, ttl_s=10.0)
            wall.advance(8.0)
            await pin(node, keys, ttl_s=10.0)
            wall.advance(8.0)
            await node.tenants.pinning.expire()
            assert len(node.tenants.pinning) == 1
            wall.advance(2.0)
            await node.tenants.pinning.expire()
            assert (len(node.tenants.pinning), len(node.host.index.pinned)) == (0, 0)

        run(with_tier(None), test)

    def test_a_renewed_pin_may_be_of_other_chunks(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(4)
            keep(node, keys, ANNA)
            await pin(node, keys[:2])
            await pin(node, keys[1:], name="b")
            await pin(node, keys[3:])
            pinned = node.host.index.pinned
            assert [key in pinned for key in keys] == [False, True, True, True]

        run(with_tier(None), test)

    def test_they_outlive_the_node(self, tmp_path: Any) -> None:
        keys, gone = chunk_keys(3), chunk_keys(2, 1)

        async def first(node: Node) -> None:
            keep(node, keys, ANNA)
            keep(node, gone, ANNA)
            await flush(node, client())
            await pin(node, keys)
            await pin(node, gone, name="b")
            await answer(node, p.Unpin(1, ANNA, "b"))

        async def second(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            for prompt in range(2, 12):
                keep(node, chunk_keys(4, prompt), BERT)
                await flush(node, client())
            assert there(node, keys, 1) == [0, 1, 2]
            assert there(node, gone, 1) == []
            page = await answer(node, p.Pins(1))
            assert [(one.owner, one.name, one.num_kept) for one in page.pins] == [(ANNA, "a", 3)]

        run(with_tier(DiskTier(tmp_path / "d"), tier_slots=10), first)
        run(with_tier(DiskTier(tmp_path / "d"), tier_slots=10), second)

    def test_a_clear_ends_them(self) -> None:
        async def test(node: Node) -> None:
            keys, other = chunk_keys(3), chunk_keys(2, 1)
            for request, left in (
                (p.Clear(1), []),
                (p.Clear(1, b"".join(keys)), ["b"]),
                (p.Clear(1, b"".join(keys[:1])), ["a", "b"]),
                (p.Clear(1, None, [], ANNA), ["b"]),
                (p.Clear(1, None, [], b"", NAMESPACE), []),
                (p.Clear(1, None, ["host"]), ["a", "b"]),
                (p.Clear(1, b"".join(keys), [], ANNA), ["b"]),
                (p.Clear(1, b"".join(keys), [], ANNA, NAMESPACE), ["b"]),
                (p.Clear(1, b"".join(keys), [], ANNA, bytes(32)), ["a", "b"]),
                (p.Clear(1, b"".join(keys), [], BERT), ["a", "b"]),
            ):
                keep(node, keys, ANNA)
                keep(node, other, BERT)
                await flush(node, client())
                await pin(node, keys, ANNA, "a")
                await pin(node, other, BERT, "b")
                await answer(node, request)
                page = await answer(node, p.Pins(1))
                assert [one.name for one in page.pins] == left, request
                node.check_integrity()
                await answer(node, p.Clear(1))

        run(with_tier(GatedTier()), test)

    def test_one_of_which_a_clear_took_some_is_of_the_rest_in_the_journal(self) -> None:
        tier, keys = Lasting(), chunk_keys(3)

        async def test(node: Node) -> None:
            keep(node, keys, ANNA)
            await flush(node, client())
            await pin(node, keys)
            await clear(node, client(), keys[1:])
            (left,) = Ledger(tier.journal).pins.values()
            assert left.keys == keys[0], "the next node would keep a cleared prompt's next copy"

        run(with_tier(tier), test)

    @pytest.mark.parametrize("by_keys", [True, False])
    def test_one_that_a_clear_ended_is_not_in_the_journal_any_more(self, by_keys: bool) -> None:
        tier, keys = Lasting(), chunk_keys(2)

        async def test(node: Node) -> None:
            keep(node, keys, ANNA)
            await flush(node, client())
            await pin(node, keys)
            assert len(Ledger(tier.journal).pins) == 1
            await answer(node, p.Clear(1, b"".join(keys) if by_keys else None))
            assert not Ledger(tier.journal).pins, "a node that is killed now has none"

        run(with_tier(tier), test)

    def test_listed_in_pages(self) -> None:
        async def test(node: Node) -> None:
            names = [f"pin {number:02}" for number in range(25)]
            for name in names:
                await pin(node, chunk_keys(1), ANNA, name)
            found, after = [], b""
            while True:
                page = await answer(node, p.Pins(1, after, 10))
                assert len(page.pins) <= 10
                found += [one.name for one in page.pins]
                after = page.after
                if not after:
                    break
            assert found == names

        run(with_tier(None), test)

    @pytest.mark.parametrize(
        ("message", "says"),
        [
            (p.Pin(1, b"", ANNA, "a", 1.0), "no chunks"),
            (p.Pin(1, bytes(32), b"a", "a", 1.0), "an owner of 1 bytes"),
            (p.Pin(1, bytes(32), ANNA, "", 1.0), "name"),
            (p.Pin(1, bytes(32), ANNA, "a\n", 1.0), "name"),
            (p.Pin(1, bytes(32), ANNA, "a", 0.0), "0.0 s"),
            (p.Pin(1, bytes(32), ANNA, "a", float("nan")), "nan s"),
            (p.Pin(1, bytes(32), ANNA, "a", float("inf")), "inf s"),
            (p.Pins(1, b"", 0), "a page of 0"),
        ],
    )
    def test_refused(self, message: Any, says: str) -> None:
        async def test(node: Node) -> None:
            with pytest.raises(UsageError, match=says):
                await answer(node, message)

        on_node(test)

    def test_a_tier_that_cannot_write_it_down_says_so(self) -> None:
        inner = Lasting()
        tier = FaultyTier(inner)

        class Full(Journal):
            full = True

            def append(self, lines: Any) -> None:
                if self.full:
                    raise TierUnavailable("no space")
                super().append(lines)

            def replace(self, lines: Any) -> None:
                if self.full:
                    raise TierUnavailable("no space")
                super().replace(lines)

        inner._journal = journal = Full()

        async def test(node: Node) -> None:
            keys = chunk_keys(2)
            keep(node, keys, ANNA)
            await flush(node, client())
            with pytest.raises(TierUnavailable, match="not after a restart: no space"):
                await pin(node, keys)
            assert len(owned(node).index.pinned) == 2, "it holds all the same"
            journal.full = False
            await node.backings[0].upkeep()
            assert len(journal.lines()) == 1

        run(with_tier(tier), test)


class TestWhatIsLearnt:
    def test_a_quota_on_disk_holds_over_restarts(self) -> None:
        tier = Lasting()
        prompts = [chunk_keys(3, number) for number in range(4)]

        async def begin(node: Node) -> None:
            assert await quota(node, ANNA, "memory", 3) == 0

        def fill(keys: list[bytes]) -> Any:
            async def test(node: Node) -> None:
                await until(lambda: node.backings[0].state == "ok")
                assert keep(node, keys, ANNA) == 3
                await flush(node, client())

            return test

        async def read(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            for keys in prompts:
                await load(node, client(), keys)
                assert held(node, ANNA, 1) <= 3
            index = owned(node).index
            await until(lambda: not owned(node)._removals.nbytes)
            assert index.num_objects == 3
            assert index.used_bytes == 3 * SLOT
            node.check_integrity(contents=True)

        run(with_tier(tier), begin)
        for keys in prompts:
            run(with_tier(tier), fill(keys))
        run(with_tier(tier), read)

    def test_nothing_joins_a_chunk_that_fills_anothers_quota(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(2)
            for tier in ("host", "memory"):
                await quota(node, ANNA, tier, 2)
            assert keep(node, keys, ANNA) == 2
            await flush(node, client())
            me = client()
            asked = p.Reserve(1, NAMESPACE, b"".join(keys), 0, 1, template(), owner=BERT)
            reserved = at_once(node.reserve(me, asked))
            sums = write(node, keys, list(offsets_of(reserved.offsets)), 1)
            done = at_once(node.commit(me, p.Commit(1, reserved.reservation, b"".join(sums))))
            assert done.count == 0
            await flush(node, me)
            for number in (0, 1):
                assert (held(node, ANNA, number), held(node, BERT, number)) == (2, 0)
            node.check_integrity(contents=True)
            # The owner's own goes on to be bound as it was.
            assert keep(node, chunk_keys(1, 1), ANNA) == 1
            assert held(node, ANNA) == 2

        on_node(test, slots=10, tier=GatedTier())

    def test_nor_in_a_slower_tier(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(2)
            assert keep(node, keys, ANNA) == 2
            await flush(node, client())
            await clear(node, client(), tiers=["host"])
            await quota(node, ANNA, "memory", 2)
            me = client()
            asked = p.Reserve(1, NAMESPACE, b"".join(keys), 0, 1, template(), owner=BERT)
            reserved = at_once(node.reserve(me, asked))
            sums = write(node, keys, list(offsets_of(reserved.offsets)), 1)
            done = at_once(node.commit(me, p.Commit(1, reserved.reservation, b"".join(sums))))
            assert done.count == 2, "host memory has no chunk of these"
            await flush(node, me)
            assert (held(node, ANNA, 1), held(node, BERT, 1)) == (2, 0)
            assert node.counters.get("over_quota_objects_total", tier="memory") == 2
            node.check_integrity(contents=True)

        on_node(test, slots=10, tier=GatedTier())
