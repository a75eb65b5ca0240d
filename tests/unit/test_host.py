"""Slots of the pool: bytes go back only when nobody holds them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstrata.memory.pool import Pool
from kvstrata.node.common.changes import Cause
from kvstrata.node.slots.host import MAX_SHAPES, HostMemory
from kvstrata.node.slots.slot import Slot, SlotState
from kvstrata.parts import order_name
from kvstrata.policies import create_policy
from kvstrata.wire.client import offsets_of

PAGE = 4096
KEYS = [bytes([number]) * 32 for number in range(8)]


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(Pool.create(4 * PAGE), create_policy("lru", 4 * PAGE))
    yield host
    host.check_integrity()
    host.close()


def ready(host: HostMemory, key: bytes, part: int = 0, order: str = "a/b") -> Slot:
    slot = host.allocate(PAGE)
    assert slot is not None
    host.publish(key, part, slot, order)
    host.unhold(slot)
    return slot


def test_a_slot_is_seen_once_it_is_published(host: HostMemory) -> None:
    slot = host.allocate(PAGE)
    assert slot is not None
    assert (slot.state, slot.holds, slot.order) == (SlotState.FILLING, 1, None)
    assert host.get(KEYS[0], 0) is None
    host.check_integrity([slot])
    with pytest.raises(AssertionError, match="filled by nobody"):
        host.check_integrity()
    host.publish(KEYS[0], 0, slot, "a/b")
    assert host.get(KEYS[0], 0) is slot
    host.unhold(slot)


def test_a_discarded_slot_goes_back_with_its_last_hold(host: HostMemory) -> None:
    slot = host.allocate(PAGE)
    assert slot is not None
    host.hold(slot)
    host.discard(slot)
    host.unhold(slot)
    assert host.allocated_bytes == PAGE
    host.unhold(slot)
    assert host.allocated_bytes == 0


@pytest.mark.parametrize("how", ["drop", "drop_object", "replace"])
def test_what_is_held_keeps_its_bytes(host: HostMemory, how: str) -> None:
    slot = ready(host, KEYS[0])
    host.hold(slot)
    if how == "drop":
        assert host.drop(KEYS[0], Cause.CLEARED) == 1
    elif how == "drop_object":
        host.drop_object(KEYS[0], 0, Cause.CORRUPT)
    else:
        ready(host, KEYS[0], order="c/d")
    assert slot.state is SlotState.GONE
    assert host.get(KEYS[0], 0) is not slot
    taken = {other.offset for other in (host.allocate(PAGE) for _ in range(9)) if other is not None}
    assert slot.offset not in taken
    before = host.allocated_bytes
    host.unhold(slot)
    assert host.allocated_bytes == before - PAGE
    for other in list(host._loose):
        host.discard(other)
        host.unhold(other)


def test_eviction_passes_over_what_is_held_and_what_is_spared(host: HostMemory) -> None:
    slots = [ready(host, key) for key in KEYS[:4]]
    host.hold(slots[0])
    with host.sparing({KEYS[1]}):
        new = host.allocate(PAGE)
    assert new is not None
    assert [key in host.index for key in KEYS[:4]] == [True, True, False, True]
    assert host.num_evicted == 1
    with host.sparing(set(KEYS)):
        assert host.allocate(PAGE) is None
    assert host.allocate(5 * PAGE) is None
    assert [key in host.index for key in KEYS[:4]] == [True, True, False, True]
    # What was passed over goes first once nothing keeps it any more.
    host.unhold(slots[0])
    others = [host.allocate(PAGE) for _ in range(3)]
    assert None not in others
    assert host.allocate(PAGE) is None
    assert host.num_evicted == 4
    for slot in (new, *others):
        assert slot is not None
        host.discard(slot)
        host.unhold(slot)


def test_no_more_is_evicted_than_is_lacking(host: HostMemory) -> None:
    for key in KEYS[:3]:
        ready(host, key)
    slots = host.allocate_many(PAGE, 2)
    assert len(slots) == 2
    assert [key in host.index for key in KEYS[:3]] == [False, True, True], "one was free"
    for slot in slots:
        host.discard(slot)
        host.unhold(slot)


def test_a_row_is_known_as_long_as_its_chunk_stays_as_it_is(host: HostMemory) -> None:
    a, b = ready(host, KEYS[0], 0), ready(host, KEYS[0], 1)
    row = host.ready_row(KEYS[0], (0, 1))
    assert row is not None
    assert (row.slots, row.order, row.nbytes) == ((a, b), "a/b", 2 * PAGE)
    assert offsets_of(row.packed_offsets()).tolist() == [a.offset, b.offset]
    assert dict(host.rows_of((0, 1)).items()) == {KEYS[0]: row}
    assert host.ready_row(KEYS[0], (0, 1)) is row
    turned = host.ready_row(KEYS[0], (1, 0))
    assert turned is not None
    assert turned.slots == (b, a)
    assert host.ready_row(KEYS[0], (0, 2)) is None
    assert host.ready_row(KEYS[1], (0,)) is None
    ready(host, KEYS[0], 2)
    assert not host.rows_of((0, 1))
    fresh = host.ready_row(KEYS[0], (2, 0, 1))
    assert fresh is not None
    assert fresh.in_orders(frozenset(["a/b"]))
    ready(host, KEYS[0], 1, order="c/d")
    mixed = host.ready_row(KEYS[0], (0, 1))
    assert mixed is not None
    assert mixed.order is None
    assert not mixed.in_orders(frozenset(["a/b"]))
    assert mixed.in_orders(frozenset(["a/b", "c/d"]))
    host.check_integrity()
    host.drop(KEYS[0], Cause.CLEARED)
    assert not host.rows_of((0, 1))


def test_of_too_many_sets_of_parts_the_rows_are_not_kept(host: HostMemory) -> None:
    a = ready(host, KEYS[0])
    rows = [host.row(KEYS[0], (0, part), [a, a]) for part in range(1, MAX_SHAPES + 2)]
    assert [row.kept for row in rows] == [True] * MAX_SHAPES + [False]
    host.drop(KEYS[0], Cause.CLEARED)
    ready(host, KEYS[1])
    last = host.ready_row(KEYS[1], (0,))
    assert last is not None
    assert last.kept
    host.check_integrity()


def test_a_byte_orders_name() -> None:
    assert order_name("native", "vllm/x") == "vllm/x"
    assert order_name("portable", "") == "portable"
