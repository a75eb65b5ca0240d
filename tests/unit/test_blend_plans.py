"""Plans of a blend: what is computed anew, as many as the ratio says, and alike on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.blend import PLANS, budget, choose, stretches
from kvstrata.errors import UsageError

gaps = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=8)


def laid(gaps: list[tuple[int, int]]) -> list[range]:
    """Stretches: behind each gap as many tokens."""
    found, at = [], 7
    for gap, count in gaps:
        found.append(range(at + gap, at + gap + count))
        at += gap + count
    return found


def deviations(reused: list[range], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(sum(map(len, reused)), np.float32)


@given(gaps, st.sampled_from(PLANS), st.floats(0, 1), st.integers(0, 9))
def test_as_many_as_the_budget_says_are_chosen_of_the_reused_ones_in_order(
    gaps: list[tuple[int, int]], plan: str, ratio: float, seed: int
) -> None:
    reused = laid(gaps)
    chosen = choose(plan, ratio, reused, deviations(reused), seed)
    most = budget(plan, ratio, sum(map(len, reused)))
    assert len(chosen) <= most if plan == "share" else len(chosen) == most
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= {position for one in reused for position in one}
    assert chosen == choose(plan, ratio, reused, deviations(reused), seed)
    assert all(type(position) is int for position in chosen)


@given(gaps, st.floats(0, 1))
def test_anchors_takes_the_same_as_edges(gaps: list[tuple[int, int]], ratio: float) -> None:
    reused = laid(gaps)
    assert choose("anchors", ratio, reused) == choose("edges", ratio, reused)


@given(gaps, st.floats(0, 1))
def test_edges_takes_the_ends_of_each_stretch_and_as_many_of_each(
    gaps: list[tuple[int, int]], ratio: float
) -> None:
    reused = laid(gaps)
    chosen = set(choose("edges", ratio, reused))
    taken = []
    for one in reused:
        inside = [position in chosen for position in one]
        # Chosen, left, chosen: nothing between two that are left.
        assert str(inside).count("True, False") <= 1
        assert str(inside).count("False, True") <= 1
        if not all(inside):
            at_end = inside[::-1].index(False)
            assert at_end == sum(inside) // 8
            taken.append(sum(inside))
    assert not taken or max(taken) - min(taken) <= 1
    if taken:
        most = min(taken) + 1
        assert all(sum(position in chosen for position in one) <= most for one in reused)


def test_edges_of_two_texts() -> None:
    chosen = choose("edges", 0.2, [range(10, 90), range(100, 180)])
    assert chosen == [*range(10, 24), 88, 89, *range(100, 114), 178, 179]


def test_deviation_takes_those_that_differ_most_and_first_what_is_no_number() -> None:
    off = np.array([3, 1, 4, 1, 5, np.nan, 2, 6], np.float32)
    reused = [range(10, 14), range(20, 24)]
    assert choose("deviation", 0.5, reused, off) == [12, 20, 21, 23]
    assert choose("deviation", 1 / 8, reused, off) == [21]
    assert choose("deviation", 0.25, reused, np.zeros(8)) == [10, 11]  # of equal ones the first


#: of few kinds, so that there are equal ones, and what is no number
offs = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e-9, 1e30, np.nan, np.inf]), max_size=12)


@given(offs, st.floats(0, 1), st.floats(0, 1))
def test_a_bound_is_kept_by_the_fewest_tokens_that_can(
    offs: list[float], bound: float, ratio: float
) -> None:
    off, reused = np.array(offs, np.float32), [range(5, 5 + len(offs))]
    chosen = {position - 5 for position in choose("deviation", 1.0, reused, off, bound=bound)}
    numbers = off[np.isfinite(off)].astype(np.float64)
    assert set(np.flatnonzero(~np.isfinite(off)).tolist()) <= chosen

    def kept(of: set[int]) -> bool:
        left = [off[i] for i in range(len(off)) if i not in of and np.isfinite(off[i])]
        return bool(sum(sorted(map(float, left))) <= bound * sum(sorted(numbers.tolist())))

    assert kept(chosen)
    # The least of them left too, it is kept no more.
    finite = [i for i in chosen if np.isfinite(off[i])]
    if finite:
        assert not kept(chosen - {min(finite, key=lambda i: off[i])})
    # A ratio cuts it off, and what is cut off is the least.
    capped = [position - 5 for position in choose("deviation", ratio, reused, off, bound=bound)]
    assert len(capped) == min(len(chosen), budget("deviation", ratio, len(off)))
    assert set(capped) <= chosen


def test_a_bound_of_some_numbers() -> None:
    off, reused = np.array([1, 0, 4, 2, 0, 3], np.float32), [range(3), range(7, 10)]
    for bound, expected in {
        1.0: [], 0.6: [2], 0.59: [2, 9], 0.1: [2, 7, 9], 0.0: [0, 2, 7, 9]
    }.items():  # fmt: skip
        assert choose("deviation", 1.0, reused, off, bound=bound) == expected
    # Where nothing is off, nothing is computed.
    assert choose("deviation", 1.0, reused, np.zeros(6), bound=0.0) == []
    assert choose("deviation", 1.0, [], np.zeros(0), bound=0.0) == []


def test_share_takes_what_is_high_and_no_more_than_the_ratio() -> None:
    reused = [range(4, 10), range(20, 24)]
    off = np.array([1, 1, 9, 1, 1, 1, 1, 1, 8, 1], np.float32)
    assert choose("share", 1.0, reused, off) == [6, 22]
    assert choose("share", 0.1, reused, off) == [6]
    assert choose("share", 1.0, reused, np.ones(10, np.float32)) == []
    assert choose("share", 1.0, [], np.empty(0, np.float32)) == []
    # What is no number is high, and hides nobody else.
    off[0] = np.nan
    assert choose("share", 1.0, reused, off) == [4, 6, 22]


@given(offs)
def test_by_share_fewer_than_half_of_the_numbers_are_high(offs: list[float]) -> None:
    off = np.array(offs, np.float32)
    high = len(choose("share", 1.0, [range(len(off))], off)) - int((~np.isfinite(off)).sum())
    assert 0 <= high <= np.isfinite(off).sum() // 2


def test_random_differs_by_seed_and_all_and_none_need_no_ratio() -> None:
    reused = [range(5, 105)]
    drawn = {tuple(choose("random", 0.1, reused, seed=seed)) for seed in range(5)}
    assert len(drawn) == 5
    assert choose("all", 0.0, reused) == list(range(5, 105))
    assert choose("none", 1.0, reused) == []


@pytest.mark.parametrize(
    ("plan", "ratio", "deviation"),
    [
        ("edge", 0.1, None),
        ("edges", -0.1, None),
        ("edges", 1.1, None),
        ("edges", float("nan"), None),
        ("deviation", 0.1, None),
        ("deviation", 0.1, np.zeros(9)),
        ("deviation", 0.1, np.zeros((2, 5))),
        ("share", 0.1, None),
    ],
)
def test_what_is_no_plan_is_refused(plan: str, ratio: float, deviation: np.ndarray | None) -> None:
    with pytest.raises(UsageError):
        choose(plan, ratio, [range(10)], deviation)


@pytest.mark.parametrize(
    ("plan", "bound"),
    [
        ("edges", 0.5),
        ("share", 0.5),
        ("deviation", -0.1),
        ("deviation", 1.1),
        ("deviation", np.nan),
    ],
)
def test_what_is_no_bound_is_refused(plan: str, bound: float) -> None:
    with pytest.raises(UsageError, match="bound"):
        choose(plan, 1.0, [range(10)], np.ones(10), bound=bound)


def test_stretches_end_where_texts_meet_that_were_computed_apart() -> None:
    pieces = [
        (0, 0, 8),  # the exact head
        (8, 108, 8), (16, 116, 4),  # one text, of two chunks
        (20, 300, 4),  # another right behind it
        (30, 310, 4),  # the same, behind a gap
    ]  # fmt: skip
    assert stretches(pieces, 8) == [range(8, 20), range(20, 24), range(30, 34)]
    assert stretches(pieces, 10)[0] == range(10, 20)
    assert stretches([], 0) == []


@pytest.mark.parametrize("pieces", [[(4, 9, 4), (7, 12, 4)], [(4, 9, 0)], [(4, -1, 4)]])
def test_pieces_out_of_order_are_refused(pieces: list[tuple[int, int, int]]) -> None:
    with pytest.raises(UsageError):
        stretches(pieces, 0)
