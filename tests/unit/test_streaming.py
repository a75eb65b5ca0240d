"""Which level each chunk of a load is read at, against links whose speed the test decides."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.node.service.bandwidth import Bandwidth
from kvstrata.node.service.streaming import Stream
from kvstrata.testing.clock import ManualClock

MB = 1_000_000.0
SIZES = [2 * MB, 1 * MB, 0.5 * MB]  # of a chunk at each level


def begun(
    sizes: Sequence[Sequence[float]],
    target_s: float,
    compute_s: float,
    bytes_per_s: Callable[[], float | None],
    width: int = 1,
    clock: ManualClock | None = None,
) -> Stream:
    """A stream of objects of these sizes, whose first have had their turn."""
    stream = Stream(target_s, compute_s, bytes_per_s, width, clock or ManualClock())
    numbers = [stream.add(one, lambda _: None) for one in sizes]
    assert numbers == list(range(len(sizes)))
    stream.begin()
    return stream


class Link:
    """A link that carries one chunk after another, at a speed that depends on the time."""

    def __init__(self, bytes_per_s: Callable[[float], float]) -> None:
        self.clock = ManualClock()
        self.speed = bytes_per_s

    def load(self, chunks: int, target_s: float, compute_s: float = math.inf) -> Stream:
        """Carry all that the stream begins; afterwards the clock says when the last one came."""

        def rate() -> float:
            return self.speed(self.clock())

        stream = begun([SIZES] * chunks, target_s, compute_s, rate, 1, self.clock)
        for number in range(chunks):
            level = stream.levels[number]
            if level is not None:
                self.clock.advance(SIZES[level] / rate())
                stream.done(number)
        assert stream.ended
        return stream


def test_a_fast_link_brings_the_finest() -> None:
    link = Link(lambda now: 200 * MB)
    assert link.load(10, target_s=0.2).levels == [0] * 10
    assert link.clock() <= 0.2


def test_a_slow_link_brings_what_is_in_time_and_uses_what_is_left() -> None:
    link = Link(lambda now: 50 * MB)
    levels = link.load(10, target_s=0.25).levels
    assert set(levels) == {0, 1}, "the slack of the coarser chunks is spent on finer ones"
    assert link.clock() <= 0.25


def test_a_link_that_slows_down_costs_quality_and_not_time() -> None:
    link = Link(lambda now: 200 * MB if now < 0.05 else 60 * MB)
    levels = link.load(20, target_s=0.3).levels
    assert levels[:5] == [0] * 5
    assert max(level for level in levels if level is not None) > 0
    assert link.clock() <= 0.3


def test_what_cannot_be_in_time_comes_as_soon_as_it_can() -> None:
    link = Link(lambda now: 1 * MB)
    assert link.load(4, target_s=0.1).levels == [2] * 4


def test_a_link_that_dies_lets_the_engine_compute_the_rest() -> None:
    link = Link(lambda now: 200 * MB if now < 0.05 else 1 * MB)
    levels = link.load(20, target_s=0.2, compute_s=0.1).levels
    assert levels[:5] == [0] * 5
    assert levels[-1] is None
    given_up = levels.index(None)
    assert levels[given_up:] == [None] * (20 - given_up)


def test_computing_is_not_asked_for_where_it_takes_longer() -> None:
    link = Link(lambda now: 10 * MB)
    assert link.load(4, target_s=0.1, compute_s=0.2).levels == [2] * 4


def test_an_unknown_link_is_taken_for_a_good_one() -> None:
    assert begun([SIZES], 0.0, 1e-9, lambda: None).levels == [0]


def test_a_missing_level_is_never_picked() -> None:
    sizes = [[2 * MB, math.inf, 0.5 * MB]] * 2
    assert begun(sizes, 0.01, math.inf, lambda: 100 * MB, 2).levels == [2, 2]


def test_a_level_that_only_what_was_begun_lacks_is_picked_again() -> None:
    sizes = [[math.inf, 1 * MB, math.inf], SIZES, SIZES]
    stream = begun(sizes, 9.0, math.inf, lambda: 100 * MB)
    stream.done(0)
    stream.done(1)
    assert stream.levels == [1, 0, 0]


def test_little_is_begun_ahead_on_a_slow_link() -> None:
    """What is under way cannot be made coarser any more."""
    levels = begun([SIZES] * 20, 9.0, 1.0, lambda: 100 * MB, 8).levels
    assert sum(SIZES[level] for level in levels if level is not None) <= 100 * MB * 0.08


def test_the_first_chunk_is_tried_whatever_was_measured() -> None:
    """Or a link that was slow once would never be tried again."""
    link = Link(lambda now: 1.0)
    assert link.load(4, target_s=0.1, compute_s=1e-3).levels == [2, None, None, None]


def test_nothing_is_begun_on_a_tier_that_is_off() -> None:
    link = Link(lambda now: 0.0)
    assert link.load(4, target_s=0.1).levels == [None] * 4


@pytest.mark.parametrize("width", [1, 3])
def test_no_more_are_under_way_than_may_be(width: int) -> None:
    stream = begun([SIZES] * 6, 9.0, 1.0, lambda: 1000 * MB, width)
    assert len(stream.levels) == width
    stream.done(0)
    stream.done(0)
    assert len(stream.levels) == width + 1


def test_each_is_told_when_it_may_be_read() -> None:
    told: list[tuple[int, int | None]] = []
    stream = Stream(0.06, 1e-3, lambda: 100 * MB, 1, ManualClock())
    for number in range(4):
        stream.add(SIZES, lambda level, number=number: told.append((number, level)))  # type: ignore[misc]
    assert (told, stream.ended) == ([], False)
    stream.begin()
    assert told == [(0, 1)]
    stream._bytes_per_s = lambda: 1.0
    stream.done(0)
    assert told == [(0, 1), (1, None), (2, None), (3, None)]
    assert stream.ended


def test_what_is_no_longer_wanted_gives_up_its_turn_and_its_share() -> None:
    """Of what was begun and of what was not; so the others come finer."""
    told: list[int] = []
    stream = Stream(0.045, math.inf, lambda: 100 * MB, 1, ManualClock())
    for number in range(4):
        stream.add(SIZES, lambda _, number=number: told.append(number))  # type: ignore[misc]
    stream.done(3)
    stream.done(3)
    stream.done(1)
    stream.begin()
    stream.done(0)
    assert (stream.levels, told) == ([0, None, 0], [0, 2])
    stream.done(2)
    assert stream.ended


def test_more_can_be_added_on_the_way() -> None:
    stream = begun([SIZES], 0.031, math.inf, lambda: 100 * MB)
    stream.done(0)
    assert (stream.levels, stream.ended) == ([0], True)
    for _ in range(3):
        stream.add(SIZES, lambda _: None)
    assert not stream.ended
    stream.begin()
    assert stream.levels == [0, 1]


@given(
    st.lists(
        st.one_of(st.just(math.inf), st.integers(1, 1000)).flatmap(
            lambda coarse: st.tuples(st.integers(1, 5000), st.just(coarse))
        ),
        min_size=1,
        max_size=20,
    ),
    st.floats(0.001, 30),
    st.sets(st.integers(0, 19)),
)
def test_picks_as_if_all_that_is_left_were_summed_up_each_time(
    sizes: list[tuple[int, float]], target: float, gone: set[int]
) -> None:
    rate = 1000.0
    stream = Stream(target, math.inf, lambda: rate, 1, clock := ManualClock())
    for one in sizes:
        stream.add(one, lambda _: None)
    for number in gone & set(range(len(sizes))):
        stream.done(number)
    stream.begin()
    for number, one in enumerate(sizes):
        if number in gone:
            continue
        rest = [sizes[n] for n in range(number, len(sizes)) if n not in gone]
        times = [sum(column) / rate for column in zip(*rest, strict=True)]
        fits = [level for level, seconds in enumerate(times) if seconds <= target - clock()]
        level = fits[0] if fits else times.index(min(times))
        assert stream.levels[number] == level
        clock.advance(one[level] / rate)
        stream.done(number)
    assert stream.ended


@given(
    rates=st.lists(st.floats(0.5, 500), min_size=1, max_size=8),
    chunks=st.integers(1, 30),
    target=st.floats(0.01, 3),
    compute=st.one_of(st.just(math.inf), st.floats(0.001, 1)),
)
def test_every_chunk_gets_one_answer(
    rates: list[float], chunks: int, target: float, compute: float
) -> None:
    """Whatever the link does, and what is given up is a tail."""
    link = Link(lambda now: rates[min(int(now * 20), len(rates) - 1)] * MB)
    levels = link.load(chunks, target, compute).levels
    assert len(levels) == chunks
    kept = [level for level in levels if level is not None]
    assert levels[: len(kept)] == kept
    if len(rates) == 1 and chunks * SIZES[2] / (rates[0] * MB) <= target * 0.999:
        assert link.clock() <= target * 1.001


def test_a_link_with_latency_is_used_in_full() -> None:
    """Many reads side by side are as fast as one there: what it brings grows with what is begun."""

    clock = ManualClock()
    bandwidth = Bandwidth(clock)
    stream = begun([SIZES] * 60, 9.0, 1.0, lambda: bandwidth.bytes_per_s, 8, clock)
    under_way: deque[float] = deque()
    peak = 0
    for number in range(60):
        while number + len(under_way) < len(stream.levels):
            under_way.append(clock() + 0.03)
            bandwidth.begin()
        peak = len(under_way)
        clock.advance(max(0.0, under_way.popleft() - clock()))
        bandwidth.end(int(SIZES[0]))
        stream.done(number)
        if number == 40:
            assert peak == 8
    assert set(stream.levels) == {0}
