"""Leases: how they count on as slots fill or fail, and whom they tell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstrata.memory.pool import Pool
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import Lease, LeaseTable
from kvstrata.node.slots.slot import Slot
from kvstrata.policies import create_policy

PAGE = 4096
ORDERS = frozenset(["a/b"])


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(Pool.create(8 * PAGE), create_policy("lru", 8 * PAGE))
    yield host
    host.close()


def filling(host: HostMemory, count: int) -> list[Slot]:
    slots = [host.allocate(PAGE) for _ in range(count)]
    return [slot for slot in slots if slot is not None]


def settle(host: HostMemory, slot: Slot, order: str | None = "a/b") -> None:
    """A slot was filled, or its filling failed."""
    if order is None:
        host.discard(slot)
    else:
        host.publish(bytes([slot.offset // PAGE]) * 32, 0, slot, order)
    waiters, slot.waiters = slot.waiters or (), None
    for tell in waiters:
        tell()


def table(host: HostMemory) -> LeaseTable:
    return LeaseTable(host, 6 * PAGE, 7 * PAGE)


def test_chunks_are_counted_in_order(host: HostMemory) -> None:
    slots = filling(host, 4)
    lease = table(host).grant(Client("a"), slots, 2, ORDERS)
    told: list[int] = []
    lease.listeners.append((0, lambda: told.append(lease.ready)))
    assert (lease.num_chunks, lease.ready) == (2, 0)
    for slot in (slots[3], slots[0]):
        settle(host, slot)
        assert (lease.ready, told) == (0, [])
    settle(host, slots[1])
    assert (lease.ready, told) == (1, [1])
    settle(host, slots[2])
    assert (lease.ready, told, lease.failed) == (2, [1], False)
    assert lease.settled(2)


@pytest.mark.parametrize("order", [None, "c/d"])
def test_a_chunk_that_will_not_come_ends_it(host: HostMemory, order: str | None) -> None:
    slots = filling(host, 3)
    lease = table(host).grant(Client("a"), slots, 1, ORDERS)
    settle(host, slots[0])
    told: list[bool] = []
    lease.listeners.append((1, lambda: told.append(lease.failed)))
    settle(host, slots[1], order)
    settle(host, slots[2])
    assert (lease.ready, lease.failed, told) == (1, True, [True])


def test_the_failed_part_given_back_leaves_a_good_lease(host: HostMemory) -> None:
    slots = filling(host, 2)
    leases = table(host)
    lease = leases.grant(Client("a"), slots, 1, ORDERS)
    settle(host, slots[0])
    settle(host, slots[1], None)
    leases.release(lease, keep=1)
    assert (lease.ready, lease.failed, lease.num_chunks) == (1, False, 1)
    leases.check_integrity()


def test_a_release_tells_who_waits(host: HostMemory) -> None:
    leases = table(host)
    lease = leases.grant(Client("a"), filling(host, 3), 1, ORDERS)
    told: list[int] = []
    lease.listeners.append((0, lambda: told.append(lease.num_chunks)))
    leases.release(lease, keep=2)
    assert told == []
    leases.release(lease)
    assert told == [0]


def test_caps(host: HostMemory) -> None:
    leases, a, b = table(host), Client("a"), Client("b")
    assert leases.room_for(a) == 6 * PAGE
    lease = leases.grant(a, filling(host, 4), 1, ORDERS)
    assert (leases.room_for(a), leases.room_for(b)) == (2 * PAGE, 3 * PAGE)
    leases.check_integrity()
    leases.release(lease, keep=1)
    assert (leases.room_for(a), leases.room_for(b)) == (5 * PAGE, 6 * PAGE)
    leases.release(lease)
    leases.release(lease)
    assert (len(leases), a.leases, leases.leased_bytes) == (0, set(), 0)


def test_a_slot_counts_once_however_many_lease_it(host: HostMemory) -> None:
    leases, a, b = table(host), Client("a"), Client("b")
    slots = filling(host, 4)
    first = leases.grant(a, slots, 1, ORDERS)
    host.hold_all(slots[:3])
    second = leases.grant(b, slots[:3], 1, ORDERS)
    host.hold_all(slots)
    third = leases.grant(a, slots, 1, ORDERS)
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


def test_numbers_mean_nothing_to_another_node(host: HostMemory) -> None:
    numbers = set()
    for _ in range(50):
        lease: Lease = table(host).grant(Client("a"), [], 1, ORDERS)
        numbers.add(lease.id)
    assert len(numbers) == 50
    assert 0 not in numbers
