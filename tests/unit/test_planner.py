"""Load or compute: the least time wins, and every term of it counts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.node.common.planner import Link, Plan, Prefill, plan

MB = 1 << 20
FLAT = Prefill(chunk_s=0.1)


def keep(tiers: list[int], links: list[Link], prefill: Prefill = FLAT) -> int:
    return plan(tiers, [MB] * len(tiers), links, prefill).keep


def test_a_fast_link_brings_everything() -> None:
    assert keep([1] * 10, [Link(100 * MB)]) == 10


def test_a_slow_link_brings_nothing() -> None:
    assert keep([1] * 10, [Link(5 * MB)]) == 0


def test_what_is_here_is_kept_whatever_the_link_does() -> None:
    assert keep([0, 0, 0, 1, 1], [Link(5 * MB)]) == 3


def test_what_is_here_behind_what_is_not_counts_for_loading() -> None:
    """One chunk over a link that is too slow for it opens the way to nine that are here."""
    assert keep([1] + [0] * 9, [Link(5 * MB)]) == 10


def test_latency_counts_only_where_it_is_not_worth_it() -> None:
    assert keep([1], [Link(100 * MB, latency_s=0.15)]) == 0
    assert keep([1, 1], [Link(100 * MB, latency_s=0.15)]) == 2


def test_what_waits_already_counts() -> None:
    assert keep([1] * 4, [Link(100 * MB)]) == 4
    assert keep([1] * 4, [Link(100 * MB, queued_bytes=100 * MB)]) == 0


def test_tiers_bring_theirs_side_by_side() -> None:
    links = [Link(12 * MB), Link(12 * MB)]
    assert keep([1, 2] * 5, links) == 10
    assert keep([1] * 10, [Link(9 * MB), Link(12 * MB)]) == 0


def test_the_slow_one_of_two_is_left_out() -> None:
    assert keep([1] * 5 + [2] * 5, [Link(100 * MB), Link(2 * MB)]) == 5


def test_the_tail_of_a_long_prompt_is_dearer_to_compute() -> None:
    """So a link may be worth it for all of a long prompt, and not for a short one."""
    prefill, link = Prefill(0.05, 0.01), Link(9 * MB)
    assert keep([1] * 5, [link], prefill) == 0
    assert keep([1] * 60, [link], prefill) == 60


def test_unknown_speeds_are_held_against_nobody() -> None:
    assert keep([1] * 5, [Link(None)]) == 5
    assert keep([1] * 5, [Link(1.0)], Prefill()) == 5
    assert keep([1] * 5, [Link(0.0)]) == 0


def test_the_estimates_are_told() -> None:
    assert plan([1] * 4, [MB] * 4, [Link(20 * MB)], FLAT) == pytest.approx(Plan(4, 0.2, 0.0))
    assert plan([1] * 4, [MB] * 4, [Link(MB)], FLAT) == pytest.approx(Plan(0, 0.0, 0.4))
    assert plan([], [], [], FLAT) == Plan(0, 0.0, 0.0)


def test_the_place_in_the_prompt_counts() -> None:
    """The same chunks are dearer to compute further back."""
    prefill, link = Prefill(0.0, 0.01), Link(10 * MB)
    assert plan([1] * 2, [MB] * 2, [link], prefill, first=1).keep == 0
    assert plan([1] * 2, [MB] * 2, [link], prefill, first=30).keep == 2


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 8)), max_size=12),
    st.tuples(*[st.tuples(st.floats(0.5, 200), st.floats(0, 1), st.integers(0, 20))] * 2),
    st.floats(0, 1.0),
    st.floats(0, 0.1),
    st.integers(0, 50),
)
def test_no_other_number_is_better(
    chunks: list[tuple[int, int]],
    shapes: tuple[tuple[float, float, int], ...],
    chunk_s: float,
    pair_s: float,
    first: int,
) -> None:
    tiers, sizes = [tier for tier, _ in chunks], [size * MB for _, size in chunks]
    links = [Link(rate * MB, latency, queued * MB) for rate, latency, queued in shapes]
    prefill = Prefill(chunk_s, pair_s)
    found = plan(tiers, sizes, links, prefill, first)

    def time_of(count: int) -> float:
        coming = [
            sum(size for tier, size in zip(tiers[:count], sizes, strict=False) if tier == number)
            for number in (1, 2)
        ]
        load = max(link.seconds(nbytes) for link, nbytes in zip(links, coming, strict=True))
        return load + prefill.seconds(first + count, first + len(chunks))

    if prefill.known:
        least = min(time_of(count) for count in range(len(chunks) + 1))
        assert time_of(found.keep) <= least * (1 + 1e-9) + 1e-12
    assert math.isclose(found.load_s + found.rest_s, time_of(found.keep), abs_tol=1e-9)
