"""The estimate of what a tier brings, on a clock that the test moves."""

from __future__ import annotations

import pytest

from kvstrata.node.service.bandwidth import Bandwidth
from kvstrata.testing.clock import ManualClock

MB = 1_000_000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def bandwidth(clock: ManualClock) -> Bandwidth:
    return Bandwidth(clock)


def read(bandwidth: Bandwidth, clock: ManualClock, nbytes: int, seconds: float) -> None:
    bandwidth.begin()
    clock.advance(seconds)
    bandwidth.end(nbytes)


def test_nothing_is_known_before_the_first_read(bandwidth: Bandwidth) -> None:
    assert bandwidth.bytes_per_s is None


@pytest.mark.parametrize("seconds", [1e-4, 0.01, 1.0, 30.0])
def test_a_steady_link_is_known_after_one_read(
    bandwidth: Bandwidth, clock: ManualClock, seconds: float
) -> None:
    for _ in range(3):
        read(bandwidth, clock, int(100 * MB * seconds), seconds)
        assert bandwidth.bytes_per_s == pytest.approx(100 * MB, rel=1e-3)
        clock.advance(1.0)  # nobody reads: that says nothing


def test_reads_side_by_side_share_the_link(bandwidth: Bandwidth, clock: ManualClock) -> None:
    for _ in range(8):
        bandwidth.begin()
    for _ in range(40):
        clock.advance(0.01)
        bandwidth.end(MB)
        bandwidth.begin()
    assert bandwidth.bytes_per_s == pytest.approx(100 * MB, rel=1e-3)


def test_a_link_that_slows_down_is_noticed_within_a_read_or_two(
    bandwidth: Bandwidth, clock: ManualClock
) -> None:
    for _ in range(50):
        read(bandwidth, clock, 2 * MB, 0.01)
    read(bandwidth, clock, 2 * MB, 0.2)
    rate = bandwidth.bytes_per_s
    assert rate is not None
    assert rate < 40 * MB
    read(bandwidth, clock, 2 * MB, 0.2)
    rate = bandwidth.bytes_per_s
    assert rate is not None
    assert rate < 14 * MB


def test_a_read_that_does_not_end_lowers_it(bandwidth: Bandwidth, clock: ManualClock) -> None:
    read(bandwidth, clock, MB, 0.01)
    bandwidth.begin()
    clock.advance(1.0)
    rate = bandwidth.bytes_per_s
    assert rate is not None
    assert rate < MB


def test_what_failed_has_brought_nothing(bandwidth: Bandwidth, clock: ManualClock) -> None:
    read(bandwidth, clock, 0, 1.0)
    assert bandwidth.bytes_per_s is None
