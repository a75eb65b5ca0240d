"""The end of a row is found in few rounds, whatever it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.node.service.gallop import Gallop


def rounds(count: int, there: int, width: int) -> tuple[int, int]:
    """How many rounds it takes, and what was found."""
    gallop, num = Gallop(count), 0
    while not gallop.ended:
        places = gallop.places(width)
        assert 1 <= len(set(places)) == len(places) <= width
        assert all(gallop.low <= place < gallop.high for place in places)
        gallop.learn({place: place < there for place in places})
        num += 1
        assert num <= count
    return num, gallop.low


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 20))
def test_it_finds_the_end(count: int, there: int, width: int) -> None:
    assert rounds(count, there, width)[1] == min(there, count)


@pytest.mark.parametrize(("count", "most"), [(16, 1), (17, 2), (200, 2), (782, 3), (3000, 3)])
def test_in_few_rounds_of_sixteen(count: int, most: int) -> None:
    assert max(rounds(count, there, 16)[0] for there in range(count + 1)) <= most


@pytest.mark.parametrize("there", [0, 782])
def test_all_or_nothing_is_one_round(there: int) -> None:
    assert rounds(782, there, 16) == (1, there)


def test_a_hole_ends_the_row() -> None:
    gallop = Gallop(10)
    gallop.learn({0: True, 4: False, 9: True})
    assert (gallop.low, gallop.high) == (1, 4)


def test_a_store_that_cannot_tell_is_not_asked_for_ever() -> None:
    gallop, num = Gallop(1000), 0
    while not gallop.ended:
        gallop.learn({place: False for place in gallop.places(16)})
        num += 1
    assert (gallop.low, num) == (0, 1)
