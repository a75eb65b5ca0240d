"""Chunks of several layer groups in the node: the longest boundary, and only what that needs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from tests.support.groups import (
    FULL,
    STATE,
    WINDOW,
    Needs,
    answered,
    group_template,
    in_small_slices,
    load_needs,
    match_needs,
    store_part,
)
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    RAW,
    SLOT,
    GatedTier,
    arrive,
    chunk_keys,
    clear,
    flush,
    on_node,
    owned,
    payload,
    stored_payload,
    until,
)

from kvstrata.errors import UsageError
from kvstrata.keys import Namespace
from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client, Holder
from kvstrata.objects import decode
from kvstrata.observe.reasons import Why
from kvstrata.parts import identity
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of
from kvstrata.wire.namespaces import Described

ME = Client("pid 1")
WINDOWED = {FULL: 0, WINDOW: 2}
STATEFUL = {FULL: 0, STATE: 1}
ALL_KINDS = {FULL: 0, WINDOW: 2, STATE: 1}


@pytest.fixture(autouse=True)
def nothing_of_the_last_test() -> None:
    ME.__init__("pid 1")  # type: ignore[misc]


def drop(node: Node, key: bytes, part: int) -> None:
    node.host.drop_object(key, part, Cause.EVICTED)


def test_a_window_is_needed_only_before_the_boundary() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(6)
        await store_part(node, ME, keys, FULL)
        await store_part(node, ME, keys, WINDOW, first=3)
        matched = await match_needs(node, ME, keys, WINDOWED)
        assert matched.tiers == bytes(6)
        assert matched.why == []
        offsets = list(offsets_of(matched.offsets))
        assert [offset == p.NEEDLESS for offset in offsets[1::2]] == [True] * 4 + [False] * 2
        assert p.NEEDLESS not in offsets[::2]
        # What is needed is held still, and counts; the rest may go.
        assert ME.leased_bytes == 8 * SLOT
        node.release(ME, p.Release(matched.lease))
        assert ME.leased_bytes == 0
        drop(node, keys[3], WINDOW)
        assert await load_needs(node, ME, keys, WINDOWED) == 6
        drop(node, keys[4], WINDOW)
        assert await load_needs(node, ME, keys, WINDOWED) == 0
        await store_part(node, ME, keys, WINDOW, stop=3)
        assert await load_needs(node, ME, keys, WINDOWED) == 3

    on_node(test, slots=20)


def test_a_state_is_needed_only_at_the_boundary() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(8)
        await store_part(node, ME, keys, FULL, stop=7)
        for number in (2, 4, 7):
            await store_part(node, ME, keys, STATE, first=number, stop=number + 1)
        assert await load_needs(node, ME, keys, STATEFUL) == 5
        assert await load_needs(node, ME, keys, {STATE: 1}) == 8
        drop(node, keys[4], STATE)
        assert await load_needs(node, ME, keys, STATEFUL) == 3
        drop(node, keys[1], FULL)
        assert await load_needs(node, ME, keys, STATEFUL) == 0

    on_node(test, slots=20)


def test_a_model_without_full_attention_leases_nothing_before_its_boundary() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(5)
        await store_part(node, ME, keys, STATE, first=3, stop=4)
        matched = await match_needs(node, ME, keys, {STATE: 1})
        assert matched.tiers == bytes(4)
        assert list(offsets_of(matched.offsets))[:3] == [p.NEEDLESS] * 3
        assert ME.leased_bytes == SLOT
        arrived = await arrive(node, ME, matched.lease)
        assert (arrived.ready, arrived.failed) == (4, False)
        node.release(ME, p.Release(matched.lease))

    on_node(test)


def test_all_needs_of_0_are_a_match_of_every_part() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(3)
        await store_part(node, ME, keys, FULL)
        await store_part(node, ME, keys, WINDOW, stop=2)
        for needs in ({FULL: 0, WINDOW: 0}, {FULL: 0}):
            assert await load_needs(node, ME, keys, needs) == 4 - len(needs)

    on_node(test)


def test_only_what_is_needed_comes_out_of_a_slower_tier() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(6)
        for part in ALL_KINDS:
            await store_part(node, ME, keys, part)
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        matched = await match_needs(node, ME, keys, ALL_KINDS)
        assert matched.tiers == bytes([1] * 6)
        assert await load_needs(node, ME, keys, ALL_KINDS) == 6
        node.release(ME, p.Release(matched.lease))
        brought = {(number, part) for number, key in enumerate(keys)
                   for part in ALL_KINDS if node.host.get(key, part)}  # fmt: skip
        assert brought == {
            *((number, FULL) for number in range(6)), (4, WINDOW), (5, WINDOW), (5, STATE)
        }  # fmt: skip
        # Some of it here, some there.
        drop(node, keys[0], FULL)
        drop(node, keys[5], WINDOW)
        matched = await match_needs(node, ME, keys, ALL_KINDS)
        assert matched.tiers == bytes([1, 0, 0, 0, 0, 1])
        node.release(ME, p.Release(matched.lease))

    on_node(test, slots=30, tier=GatedTier())


def test_what_does_not_arrive_fails_the_whole_lease_at_once() -> None:
    async def test(node: Node) -> None:
        tier, keys = owned(node).tier, chunk_keys(6)
        assert isinstance(tier, GatedTier)
        for part in WINDOWED:
            await store_part(node, ME, keys, part)
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        # The last window has gone where nobody saw it, and all else waits.
        tier.delete([identity(keys[5], WINDOW)])
        matched = await match_needs(node, ME, keys, WINDOWED)
        assert len(matched.tiers) == 6
        arrived = p.Arrived(1, 0, False, b"")
        while not arrived.failed:
            arrived = await asyncio.wait_for(arrive(node, ME, matched.lease, arrived.ready), 10)
        assert (arrived.ready, arrived.offsets) == (0, b"")
        again = await arrive(node, ME, matched.lease, 3)
        assert (again.ready, again.failed) == (0, True)
        node.release(ME, p.Release(matched.lease))
        # It is known by now to have gone.
        assert await load_needs(node, ME, keys, WINDOWED) == 5

    on_node(test, slots=30, tier=GatedTier())


def test_a_lease_fails_while_the_rest_of_it_is_still_on_its_way() -> None:
    async def test(node: Node) -> None:
        tier, keys = owned(node).tier, chunk_keys(6)
        assert isinstance(tier, GatedTier)
        for part in WINDOWED:
            await store_part(node, ME, keys, part)
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        tier.shut("read")
        matched = await match_needs(node, ME, keys, WINDOWED)
        waiting = asyncio.ensure_future(arrive(node, ME, matched.lease))
        await clear(node, ME, keys[5:])
        arrived = await asyncio.wait_for(waiting, 10)
        assert (arrived.ready, arrived.failed) == (0, True)
        node.release(ME, p.Release(matched.lease))
        tier.open()

    on_node(test, slots=30, tier=GatedTier())


def test_an_object_of_another_kind_is_not_loaded() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(3)
        for part in (WINDOW, STATE):
            await store_part(node, ME, keys, part)
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        # Every chunk of a window is asked for, as if it were full attention.
        assert await load_needs(node, ME, keys, {WINDOW: 0, STATE: 1}) == 0
        counts = node.counters.snapshot()
        assert counts['incompatible_objects_total{tier="memory"}'] >= 1
        await until(lambda: not list(node.movement.under_way()))
        assert await load_needs(node, ME, keys, {WINDOW: 2, STATE: 1}) == 3

    on_node(test, slots=30, tier=GatedTier())


@pytest.mark.parametrize("part", [FULL, WINDOW])
def test_what_goes_meanwhile_leaves_the_next_lower_boundary(
    monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    async def test(node: Node) -> None:
        keys, seen = chunk_keys(10), set()
        in_small_slices(monkeypatch)
        for turns in range(60):
            for each in WINDOWED:
                await store_part(node, ME, keys, each)
            loading = asyncio.ensure_future(match_needs(node, ME, keys, WINDOWED))
            for _ in range(turns):
                await asyncio.sleep(0)
            drop(node, keys[8], part)
            matched = await loading
            boundary = len(matched.tiers)
            seen.add(boundary)
            offsets = list(offsets_of(matched.offsets))
            for number in range(boundary):
                for place, each in enumerate(WINDOWED):
                    if each == FULL or number >= boundary - 2:
                        offset = offsets[2 * number + place]
                        assert stored_payload(node, offset) == payload(keys[number], each)
            node.release(ME, p.Release(matched.lease))
        assert seen == {8, 10}

    on_node(test, slots=30)


def test_several_that_ask_for_the_same_at_once_all_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(8)
        for part in ALL_KINDS:
            await store_part(node, ME, keys, part)
        await flush(node, ME)
        in_small_slices(monkeypatch)
        for _ in range(5):
            await clear(node, ME, tiers=["host"])
            clients = [Client(f"pid {number}") for number in range(4)]
            asked = [(keys, ALL_KINDS), (keys, WINDOWED), (keys[:5], ALL_KINDS), (keys, STATEFUL)]
            loads = [load_needs(node, one, *what) for one, what in zip(clients, asked, strict=True)]
            assert await asyncio.gather(*loads) == [8, 8, 5, 8]
            await until(lambda: not list(node.movement.under_way()))
            node.check_integrity()

    on_node(test, slots=40, tier=GatedTier())


def test_the_planner_leaves_a_boundary_to_the_engine_and_to_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(node: Node) -> None:
        keys, other, computed = chunk_keys(6), Client("pid 2"), 0
        for part in WINDOWED:
            await store_part(node, ME, keys, part)
        await flush(node, ME)
        in_small_slices(monkeypatch)
        bandwidth = owned(node).bandwidth
        for turns in range(40):
            await clear(node, ME, tiers=["host"])
            await load_needs(node, ME, keys[:2], WINDOWED)
            bandwidth._bytes, bandwidth._seconds = 10.0 * SLOT, 1.0  # ten objects in a second
            bandwidth.looked()
            planned = match_needs(node, other, keys, WINDOWED, chunk_s=0.05)
            asking = asyncio.ensure_future(planned)
            for _ in range(turns):
                await asyncio.sleep(0)
            assert await load_needs(node, ME, keys, {FULL: 0}) == 6
            matched = await asking
            if len(matched.tiers) == 2:
                computed += 1
                assert (matched.found, matched.why[0].why) == (6, Why.PLANNED)
            node.release(other, p.Release(matched.lease))
            await until(lambda: not list(node.movement.under_way()))
            node.check_integrity()
        assert computed > 5

    on_node(test, slots=40, tier=GatedTier())


def test_a_lease_of_a_boundary_is_not_kept_in_part() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(3)
        for part in WINDOWED:
            await store_part(node, ME, keys, part)
        matched = await match_needs(node, ME, keys, WINDOWED)
        with pytest.raises(UsageError, match="ends whole"):
            node.release(ME, p.Release(matched.lease, 1))
        assert ME.leased_bytes == 5 * SLOT
        node.release(ME, p.Release(matched.lease))
        assert ME.leased_bytes == 0

    on_node(test)


@pytest.mark.parametrize("cap", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12])
def test_under_a_cap_it_is_a_lower_boundary_that_is_whole(cap: int) -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(8)
        for part in WINDOWED:
            await store_part(node, ME, keys, part)
        matched = await match_needs(node, ME, keys, WINDOWED)
        boundary = len(matched.tiers)
        # Of n chunks n full parts, and of the last two the window.
        assert boundary == max(n for n in range(9) if n + min(2, n) <= cap)
        assert ME.leased_bytes == (boundary + min(2, boundary)) * SLOT
        if boundary < 8:
            assert matched.why[0].why is Why.CAPPED
        if matched.lease:
            node.release(ME, p.Release(matched.lease))
        assert ME.leased_bytes == 0

    on_node(test, slots=32, per_client=cap / 32)


@pytest.mark.parametrize("cap", [20, 30, 45])
def test_under_a_cap_a_long_window_is_whole_too(cap: int) -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(40)
        for part in WINDOWED:
            await store_part(node, ME, keys, part)
        boundary = await load_needs(node, ME, keys, {FULL: 0, WINDOW: 20})
        assert boundary == max(n for n in range(41) if n + min(20, n) <= cap)

    on_node(test, slots=128, per_client=cap / 128)


def test_without_room_it_is_a_lower_boundary_that_is_whole() -> None:
    async def test(node: Node) -> None:
        keys, others = chunk_keys(8), chunk_keys(13, prompt=1)
        for part in STATEFUL:
            assert await store_part(node, ME, keys, part) == 8
        await flush(node, ME)
        await clear(node, ME, tiers=["host"])
        await store_part(node, ME, others, FULL)
        await flush(node, ME)
        held = await match_needs(node, ME, others, {FULL: 0})
        # Three slots are left.
        assert await load_needs(node, ME, keys, STATEFUL) == 2
        await until(lambda: not node.movement.filling())
        node.release(ME, p.Release(held.lease))
        assert await load_needs(node, ME, keys, STATEFUL) == 8

    on_node(test, slots=16, tier=GatedTier())


@pytest.mark.parametrize("needs", [{FULL: 0}, WINDOWED], ids=["full", "windowed"])
def test_a_match_that_dies_of_a_bug_leaves_no_lease(
    needs: Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes would be held as long as the client lives."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    async def test(node: Node) -> None:
        keys = chunk_keys(4)
        for part in needs:
            await store_part(node, ME, keys, part)
        with monkeypatch.context() as patch:
            patch.setattr(node._matcher._answers, "of", broken)
            with pytest.raises(ZeroDivisionError):
                await match_needs(node, ME, keys, needs)
        assert ME.leased_bytes == 0
        assert node.status(ME, p.Status(1)).state["leases"]["count"] == 0
        assert await load_needs(node, ME, keys, needs) == 4

    on_node(test, slots=20)


def test_a_needs_that_goes_with_nothing_is_refused() -> None:
    async def test(node: Node) -> None:
        keys = b"".join(chunk_keys(2))
        for wrong in (
            p.Match(1, keys, [FULL, WINDOW], [ORDER], needs=[1]),
            p.Match(1, keys, [FULL], [ORDER], needs=[-1]),
            p.Match(1, keys, [FULL], [ORDER], needs=[p.MAX_KEYS + 1]),
            p.Match(1, keys, [FULL], [ORDER], expected_s=-1.0, needs=[1]),
            p.Match(1, keys, [FULL], [ORDER], [RAW], tail=[RAW, RAW], needs=[1]),
        ):
            with pytest.raises(UsageError):
                node.match(ME, wrong)

    on_node(test)


def test_headers_say_what_group_they_are_of() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(3)
        for part in ALL_KINDS:
            await store_part(node, ME, keys, part)
        found = {}
        for part in ALL_KINDS:
            slot = node.host.get(keys[2], part)
            assert slot is not None
            header = decode(node.host.pool.view(slot.offset, slot.nbytes))
            found[part] = (header.group, header.group_kind, header.boundary)
        assert found == {
            FULL: (0, "full", 0), WINDOW: (1, "sliding", 256), STATE: (2, "recurrent", 3 * 128)
        }  # fmt: skip
        for wrong in (
            replace(group_template(WINDOW), group=2),
            replace(group_template(WINDOW), boundary=0),
            replace(group_template(WINDOW), group_kind="full"),
            replace(group_template(WINDOW), group_kind="other"),
        ):
            with pytest.raises(UsageError):
                node.reserve(ME, p.Reserve(1, NAMESPACE, b"".join(keys), 0, WINDOW, wrong))

    on_node(test)


@pytest.mark.parametrize("needs", [{FULL: 0, WINDOW: 2}, {WINDOW: 2}])
@pytest.mark.parametrize("cap", [1, 5, 20])
def test_who_has_died_meanwhile_gets_nothing(
    monkeypatch: pytest.MonkeyPatch, needs: Needs, cap: int
) -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(6)
        for part in WINDOWED:
            assert await store_part(node, ME, keys, part) == 6
        in_small_slices(monkeypatch)
        node.leases.per_client_bytes = cap * SLOT
        for turns in range(60):
            client = Client("pid 2", Holder())
            answer = asyncio.ensure_future(match_needs(node, client, keys, needs))
            for _ in range(turns):
                await asyncio.sleep(0)
            node.end(client)
            await answer
            node.end(client)
            assert client.leased_bytes == 0
            assert not client.leases
            node.check_integrity()

    on_node(test, slots=20)


async def explain(node: Node, keys: list[bytes], digest: bytes) -> p.Explained:
    answer: Any = node.handle(ME, p.Explain(1, "", b"".join(keys), digest))
    explained = await answer
    assert isinstance(explained, p.Explained)
    return explained


SPACE = Namespace("fingerprint", "layout", 128)
TOLD = Described(SPACE, {}, [ORDER], list(WINDOWED), list(WINDOWED.values()), [RAW, RAW])


def test_an_operator_sees_what_a_match_would_lease() -> None:
    async def test(node: Node) -> None:
        keys, digest = chunk_keys(6), SPACE.digest()
        await store_part(node, ME, keys, FULL, stop=5)
        await store_part(node, ME, keys, WINDOW, first=1, stop=4)
        lookup = p.Lookup(1, b"".join(keys), list(WINDOWED), [ORDER], digest)
        assert (await answered(node.lookup(ME, lookup))).tiers == bytes([255, 0, 0, 0, 255, 255])
        node.record(ME, p.Record(TOLD.record()))
        assert (await answered(node.lookup(ME, lookup))).tiers == bytes([0, 0, 0, 0, 255, 255])
        explained = await explain(node, keys, digest)
        assert explained.tiers == bytes(4)
        reasons = [(one.why, one.chunks, one.detail) for one in explained.reasons]
        assert reasons == [(Why.NEVER, 1, "parts"), (Why.NEVER, 1, "")]
        drop(node, keys[3], WINDOW)
        explained = await explain(node, keys, digest)
        assert explained.tiers == bytes(3)
        matched = await match_needs(node, ME, keys, WINDOWED)
        assert [(one.why, one.chunks) for one in matched.why] == [
            (one.why, one.chunks) for one in explained.reasons
        ]
        node.release(ME, p.Release(matched.lease))

    on_node(test, slots=20)


def test_a_record_of_needs_that_do_not_go_with_the_parts_is_refused() -> None:
    async def test(node: Node) -> None:
        for wrong in (
            replace(TOLD, needs=[1]),
            replace(TOLD, needs=[0, -1]),
            replace(TOLD, lengths=[RAW, 0]),
        ):
            with pytest.raises(UsageError):
                node.record(ME, p.Record(wrong.record()))

    on_node(test)
