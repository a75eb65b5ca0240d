"""Cuts by content: the same in every place, few moved by an edit, pieces of bounded size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.blend.boundaries import LEAST, MASK_BITS, MOST, pieces
from kvstrata.blend.segments import MAX_SEGMENTS

Ids = list[int]


def text(count: int, seed: int = 0) -> Ids:
    return [int(one) for one in np.random.default_rng(seed).integers(0, 50_000, count)]


def contents(tokens: Ids) -> list[tuple[int, ...]]:
    return [tuple(tokens[i] for i in one) for one in pieces(tokens)]


@given(st.lists(st.integers(0, 2**31 - 1), max_size=3000), st.integers(0, 5))
def test_pieces_lie_side_by_side_and_are_of_bounded_size(tokens: Ids, repeats: int) -> None:
    tokens = tokens * (1 + repeats)
    found = pieces(tokens)
    at = 0
    for one in found:
        assert one.start == at
        assert LEAST <= len(one) <= MOST
        at = one.stop
    assert at <= len(tokens)
    assert len(tokens) - at < MOST or len(found) == MAX_SEGMENTS


def test_pieces_are_as_long_as_they_are_meant_to_be() -> None:
    lengths = [len(one) for one in pieces(text(30_000))]
    assert len(lengths) < MAX_SEGMENTS
    # Less than LEAST + 2^MASK_BITS, since none is longer than MOST.
    assert 0.8 < np.mean(lengths) / (LEAST + 2**MASK_BITS) < 1.1


@pytest.mark.parametrize(
    ("cut", "inserted"), [(5000, text(3, 1)), (5000, []), (0, text(700, 2)), (9000, [7])]
)
def test_behind_an_edit_the_pieces_are_those_of_before(cut: int, inserted: Ids) -> None:
    before = text(20_000)
    after = before[:cut] + inserted + before[cut + 2 :]
    known, now = set(contents(before)), contents(after)
    new = [one for one in now if one not in known]
    assert sum(map(len, new)) < len(inserted) + 3 * MOST
    assert len(new) <= 4
    assert now[-1] in known


def test_the_same_text_is_cut_alike_behind_another_one() -> None:
    body = text(12_000)
    alone, behind = set(contents(body)), set(contents(text(1111, 3) + body))
    assert len(alone & behind) >= len(alone) - 3


def test_a_very_long_prompt_has_as_many_as_a_request_may_name() -> None:
    assert len(pieces(text(80_000))) == MAX_SEGMENTS
    assert pieces([]) == []
    assert len(pieces([5] * 5000)) == 5000 // MOST or len(pieces([5] * 5000)) == 5000 // LEAST
