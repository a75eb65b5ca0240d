"""Which level each chunk of a load is read at, against links whose speed the test decides."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.node.service.bandwidth import Bandwidth
from kvstrata.node.service.streaming import Stream
from kvstrata.testing.clock import ManualClock

MB = 1_000_000.0
SIZES = [2 * MB, 1 * MB, 0.5 * MB]  # of a chunk at each level


class Link:
    """A link that carries one chunk after another, at a speed that depends on the time."""

    def __init__(self, bytes_per_s: Callable[[float], float]) -> None:
        self.clock = ManualClock()
        self.speed = bytes_per_s

    def load(self, chunks: int, target_s: float, compute_s: float = math.inf) -> Stream:
        """Carry all that the stream begins; afterwards the clock says when the last one came."""

        async def run() -> Stream:
            stream = Stream(
                [SIZES] * chunks, target_s, compute_s,
                lambda: self.speed(self.clock()), 1, self.clock,
            )  # fmt: skip
            stream.start()
            for number in range(chunks):
                level = await asyncio.wait_for(stream.turn(number), 1)
                if level is not None:
                    self.clock.advance(SIZES[level] / self.speed(self.clock()))
                    stream.done(number)
            return stream

        return asyncio.run(run())


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
    async def run() -> None:
        stream = Stream([SIZES], 0.0, 1e-9, lambda: None, 1, ManualClock())
        stream.start()
        assert await stream.turn(0) == 0

    asyncio.run(run())


def test_a_missing_level_is_never_picked() -> None:
    async def run() -> None:
        sizes = [[2 * MB, math.inf, 0.5 * MB]] * 2
        stream = Stream(sizes, 0.01, math.inf, lambda: 100 * MB, 2, ManualClock())
        stream.start()
        assert [await stream.turn(0), await stream.turn(1)] == [2, 2]

    asyncio.run(run())


def test_little_is_begun_ahead_on_a_slow_link() -> None:
    """What is under way cannot be made coarser any more."""

    async def run() -> None:
        stream = Stream([SIZES] * 20, 9.0, 1.0, lambda: 100 * MB, 8, ManualClock())
        stream.start()
        assert sum(SIZES[level] for level in stream.levels if level is not None) <= 100 * MB * 0.08

    asyncio.run(run())


def test_the_first_chunk_is_tried_whatever_was_measured() -> None:
    """Or a link that was slow once would never be tried again."""
    link = Link(lambda now: 1.0)
    assert link.load(4, target_s=0.1, compute_s=1e-3).levels == [2, None, None, None]


def test_nothing_is_begun_on_a_tier_that_is_off() -> None:
    link = Link(lambda now: 0.0)
    assert link.load(4, target_s=0.1).levels == [None] * 4


@pytest.mark.parametrize("width", [1, 3])
def test_no_more_are_under_way_than_may_be(width: int) -> None:
    async def run() -> None:
        stream = Stream([SIZES] * 6, 9.0, 1.0, lambda: 1000 * MB, width, ManualClock())
        stream.start()
        assert len(stream.levels) == width
        stream.done(0)
        stream.done(0)
        assert len(stream.levels) == width + 1

    asyncio.run(run())


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

    async def run() -> None:
        clock = ManualClock()
        bandwidth = Bandwidth(clock)
        stream = Stream([SIZES] * 60, 9.0, 1.0, lambda: bandwidth.bytes_per_s, 8, clock)
        under_way: deque[float] = deque()
        peak = 0
        stream.start()
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

    asyncio.run(run())
