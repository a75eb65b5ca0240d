"""Which boundary is the longest, and what it needs: against the rule itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.support.groups import longest_of, needed

from kvstrata.node.common.slices import at_once
from kvstrata.node.slots.boundaries import longest, spread, stretches
from kvstrata.node.slots.slot import Row, Slot
from kvstrata.wire.client import offsets_of
from kvstrata.wire.protocol import NEEDLESS

needs_ = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@given(needs_, st.integers(0, 12), st.data())
def test_the_longest_boundary_is_found_and_why_the_end_is_none(
    needs: list[int], count: int, data: st.DataObject
) -> None:
    there = {
        (column, number): not need or data.draw(st.booleans())
        for column, need in enumerate(needs)
        for number in range(count)
    }
    found, hole = at_once(longest(needs, count, lambda *place: there[place]))
    by_column = dict(enumerate(needs))
    assert found == longest_of(
        {place for place, is_there in there.items() if is_there}, by_column, count
    )
    if found == count:
        assert hole == -1
    else:
        assert any(
            not there[column, hole] and needed(need, count, hole)
            for column, need in by_column.items()
        )


@given(needs_, st.integers(0, 12), st.integers(0, 12), st.data())
def test_what_is_not_longer_than_the_least_is_not_looked_at(
    needs: list[int], count: int, least: int, data: st.DataObject
) -> None:
    there = {
        (column, number): not need or data.draw(st.booleans())
        for column, need in enumerate(needs)
        for number in range(count)
    }
    exact = longest_of(
        {place for place, is_there in there.items() if is_there}, dict(enumerate(needs)), count
    )
    found, _ = at_once(longest(needs, count, lambda *place: there[place], least))
    assert found == exact if exact > least else found <= least


@given(needs_, st.integers(0, 12))
def test_stretches_cover_each_chunk_once_with_what_it_needs(
    needs: list[int], boundary: int
) -> None:
    some = stretches(needs, boundary)
    numbers = [number for one in some for number in range(one.start, one.stop)]
    assert numbers == list(range(boundary))
    for one in some:
        for number in range(one.start, one.stop):
            for column, need in enumerate(needs):
                assert (column in one.columns) == needed(need, boundary, number)


@given(needs_, st.integers(1, 8), st.integers(0, 9), st.integers(0, 9))
def test_offsets_stand_where_their_parts_do(
    needs: list[int], boundary: int, start: int, stop: int
) -> None:
    shape = stretches(needs, boundary)
    rows = []
    for one in shape:
        for number in range(one.start, one.stop):
            slots = [Slot(4096 * (100 * number + column), 4096) for column in one.columns]
            for slot in slots:
                slot.order = "x"
            rows.append(Row(slots))
    stop = min(stop, boundary)
    offsets = offsets_of(spread(rows, start, stop, shape, len(needs)))
    assert list(offsets) == [
        4096 * (100 * number + column) if needed(need, boundary, number) else NEEDLESS
        for number in range(start, stop)
        for column, need in enumerate(needs)
    ]
