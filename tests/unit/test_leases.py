"""Leases: how they count on as rows fill or fail, whom they tell, and what they are charged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from kvstrata.memory.pool import Pool
from kvstrata.node.common.changes import Cause
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import Lease, LeaseTable
from kvstrata.node.slots.slot import Row, Slot, SlotState
from kvstrata.policies import create_policy

PAGE = 4096
ORDERS = frozenset(["a/b"])


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(Pool.create(8 * PAGE), create_policy("lru", 8 * PAGE))
    yield host
    host.close()


def chunk(slot: Slot) -> bytes:
    return bytes([slot.offset // PAGE]) * 32


def filling(host: HostMemory, count: int, num_parts: int = 1) -> list[Slot]:
    """Slots that are being promoted."""
    slots = host.allocate_many(PAGE, count * num_parts)
    for slot in slots:
        slot.rows = []
    return slots


def rows_of(host: HostMemory, slots: Sequence[Slot], num_parts: int = 1) -> list[Row]:
    chunks = [slots[i : i + num_parts] for i in range(0, len(slots), num_parts)]
    return [host.row(chunk(of[0]), tuple(range(num_parts)), of) for of in chunks]


def grant(leases: LeaseTable, client: Client, rows: list[Row]) -> Lease:
    lease = leases.grant(client, ORDERS)
    leases.extend(lease, rows)
    return lease


def settle(host: HostMemory, slot: Slot, order: str | None = "a/b", key: bytes = b"") -> None:
    """A slot was filled, or its filling failed."""
    if order is None:
        host.forget_rows(key or chunk(slot))
        host.discard(slot)
    else:
        host.publish(key or chunk(slot), 0, slot, order)
    for row in slot.rows or ():
        row.filled(slot)


def end(host: HostMemory, leases: LeaseTable, slot: Slot) -> None:
    leases.promotion_ended(slot)
    host.unhold(slot)


def table(host: HostMemory) -> LeaseTable:
    return LeaseTable(host, 6 * PAGE, 7 * PAGE)


def test_chunks_are_counted_in_order(host: HostMemory) -> None:
    slots = filling(host, 2, 2)
    lease = grant(table(host), Client("a"), rows_of(host, slots, 2))
    told: list[int] = []
    lease.listeners.append((partial(lease.settled, 0), lambda: told.append(lease.ready)))
    assert (lease.num_chunks, lease.ready) == (2, 0)
    for at in (3, 0):
        host.publish(chunk(slots[at // 2 * 2]), at % 2, slots[at], "a/b")
        lease.rows[at // 2].filled(slots[at])
        assert (lease.ready, told) == (0, [])
    for at, ready in ((1, 1), (2, 2)):
        host.publish(chunk(slots[at // 2 * 2]), at % 2, slots[at], "a/b")
        lease.rows[at // 2].filled(slots[at])
        assert (lease.ready, told) == (ready, [1])
    assert not lease.failed
    assert lease.settled(2)


@pytest.mark.parametrize("order", [None, "c/d"])
def test_a_chunk_that_will_not_come_ends_it(host: HostMemory, order: str | None) -> None:
    slots = filling(host, 3)
    lease = grant(table(host), Client("a"), rows_of(host, slots))
    settle(host, slots[0])
    told: list[bool] = []
    lease.listeners.append((partial(lease.settled, 1), lambda: told.append(lease.failed)))
    settle(host, slots[1], order)
    settle(host, slots[2])
    assert (lease.ready, lease.failed, told) == (1, True, [True])


def test_one_part_that_will_not_come_is_enough(host: HostMemory) -> None:
    """There is no need to wait for the others."""
    slots = filling(host, 1, 2)
    lease = grant(table(host), Client("a"), rows_of(host, slots, 2))
    settle(host, slots[1], None, chunk(slots[0]))
    assert (lease.ready, lease.failed) == (0, True)
    settle(host, slots[0])
    assert (lease.ready, lease.failed) == (0, True)


def test_the_failed_part_given_back_leaves_a_good_lease(host: HostMemory) -> None:
    slots = filling(host, 2)
    leases = table(host)
    lease = grant(leases, Client("a"), rows_of(host, slots))
    settle(host, slots[0])
    settle(host, slots[1], None)
    leases.release(lease, keep=1)
    assert (lease.ready, lease.failed, lease.num_chunks) == (1, False, 1)
    leases.check_integrity(slots)


def test_a_release_tells_who_waits(host: HostMemory) -> None:
    leases = table(host)
    lease = grant(leases, Client("a"), rows_of(host, filling(host, 3)))
    told: list[int] = []
    lease.listeners.append((partial(lease.settled, 0), lambda: told.append(lease.num_chunks)))
    leases.release(lease, keep=2)
    assert told == []
    leases.release(lease)
    assert told == [0]


def ready_rows(host: HostMemory, count: int) -> list[Row]:
    rows = []
    for slot in host.allocate_many(PAGE, count):
        host.publish(chunk(slot), 0, slot, "a/b")
        host.unhold(slot)
        row = host.ready_row(chunk(slot), (0,))
        assert row is not None
        rows.append(row)
    return rows


def test_caps(host: HostMemory) -> None:
    leases, a, b = table(host), Client("a"), Client("b")
    assert leases.room_for(a) == 6 * PAGE
    lease = grant(leases, a, ready_rows(host, 4))
    assert (leases.room_for(a), leases.room_for(b)) == (2 * PAGE, 3 * PAGE)
    leases.check_integrity()
    leases.release(lease, keep=1)
    assert (leases.room_for(a), leases.room_for(b)) == (5 * PAGE, 6 * PAGE)
    leases.release(lease)
    leases.release(lease)
    assert (len(leases), a.leases, leases.leased_bytes) == (0, set(), 0)


def test_a_row_counts_once_however_many_lease_it(host: HostMemory) -> None:
    leases, a, b = table(host), Client("a"), Client("b")
    rows = ready_rows(host, 4)
    first = grant(leases, a, rows)
    second = grant(leases, b, rows[:3])
    third = grant(leases, a, rows)
    assert (a.leased_bytes, b.leased_bytes, leases.leased_bytes) == (4 * PAGE, 0, 4 * PAGE)
    leases.check_integrity()
    leases.release(first)
    leases.release(third, keep=1)
    # What the other still holds stays charged to who leased it first.
    assert (a.leased_bytes, b.leased_bytes, leases.leased_bytes) == (3 * PAGE, 0, 3 * PAGE)
    leases.check_integrity()
    leases.release(third)
    leases.release(second)
    assert (a.leased_bytes, b.leased_bytes, leases.leased_bytes) == (0, 0, 0)
    leases.check_integrity()


def test_what_is_promoted_counts_until_it_has_ended(host: HostMemory) -> None:
    """Past its deadline and past its last lease: a thread may still write there."""
    leases, a, b = table(host), Client("a"), Client("b")
    slots = filling(host, 3)
    first = grant(leases, a, rows_of(host, slots))
    second = grant(leases, b, rows_of(host, slots)[:1])
    assert leases.release(first) == slots[1:]
    assert (a.leased_bytes, b.leased_bytes, leases.leased_bytes) == (3 * PAGE, 0, 3 * PAGE)
    assert leases.release(second) == slots[:1]
    settle(host, slots[0], None)
    settle(host, slots[1])
    leases.check_integrity(slots)
    assert leases.leased_bytes == 3 * PAGE
    # Who wants it again meanwhile pays nothing, and keeps it.
    third = grant(leases, b, rows_of(host, slots[1:]))
    settle(host, slots[2])
    for slot in slots:
        end(host, leases, slot)
        assert leases.leased_bytes == 2 * PAGE
    leases.check_integrity()
    host.check_integrity()
    assert leases.release(third) == []
    assert (a.leased_bytes, b.leased_bytes, leases.leased_bytes) == (0, 0, 0)
    assert [slot.holds for slot in slots] == [0, 0, 0]
    assert host.allocated_bytes == 2 * PAGE


@pytest.mark.parametrize("how", ["drop", "drop_object", "replace", "another part"])
def test_a_leased_row_keeps_its_bytes_when_its_chunk_changes(host: HostMemory, how: str) -> None:
    leases = table(host)
    (row,) = ready_rows(host, 1)
    lease = grant(leases, Client("a"), [row])
    (slot,), key = row.slots, chunk(row.slots[0])
    assert slot.holds == 0
    if how == "drop":
        host.drop(key, Cause.CLEARED)
    elif how == "drop_object":
        host.drop_object(key, 0, Cause.CORRUPT)
    else:
        new = host.allocate(PAGE)
        assert new is not None
        host.publish(key, how == "another part", new, "a/b")
        host.unhold(new)
    assert (row.pinned, row.kept, slot.holds) == (True, False, 1)
    assert slot.state is (SlotState.READY if how == "another part" else SlotState.GONE)
    assert slot.offset not in {other.offset for other in host.allocate_many(PAGE, 8)}
    leases.check_integrity()
    leases.release(lease)
    assert (row.pinned, slot.holds) == (False, 0)
    filling = list(host._loose)
    host.check_integrity(filling)
    for other in filling:
        host.discard(other)
        host.unhold(other)
    assert host.allocated_bytes == (2 * PAGE if how == "another part" else 0)


def test_what_was_leased_is_evicted_when_it_is_not_any_more(host: HostMemory) -> None:
    leases = table(host)
    rows = ready_rows(host, 8)
    lease = grant(leases, Client("a"), rows[:6])
    assert len(host.allocate_many(PAGE, 8)) == 2
    leases.release(lease, keep=5)
    assert len(host.allocate_many(PAGE, 8)) == 1
    leases.release(lease)
    assert len(host.allocate_many(PAGE, 8)) == 5
    assert len(host.index) == 0


def test_numbers_mean_nothing_to_another_node(host: HostMemory) -> None:
    numbers = {table(host).grant(Client("a"), ORDERS).id for _ in range(50)}
    assert len(numbers) == 50
    assert 0 not in numbers
