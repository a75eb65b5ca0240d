"""What may be spent of a step: nothing where it is unknown, else a small part for all."""

from __future__ import annotations

import pytest

from kvstrata.connectors.vllm.messages import WorkerReport
from kvstrata.connectors.vllm.pace import (
    COPY_SHARE,
    NUM_REMEMBERED,
    WAIT_SHARE,
    Computing,
    Pace,
    Rate,
)
from kvstrata.testing.clock import ManualClock


def test_an_unknown_step_is_worth_no_wait_and_no_copy() -> None:
    pace = Pace(0.002)
    assert pace.step_s(1000) == 0.0
    assert pace.patience_s(busy=True) == 0.0
    assert not pace.is_short(1e-6, 1000)
    assert pace.patience_s(busy=False) == 0.002


def test_a_step_lasts_until_the_next_or_until_nothing_runs() -> None:
    clock = ManualClock()
    pace = Pace(0.002, clock)
    pace.step(1)
    clock.advance(0.02)
    pace.step(1)
    assert pace.step_s() == pytest.approx(0.02)
    clock.advance(0.04)
    pace.rest()
    clock.advance(100.0)  # nobody asks for anything
    pace.step(0)
    clock.advance(100.0)
    pace.step(1)
    assert pace.step_s() == pytest.approx(0.03), "neither rest nor empty steps count"
    for _ in range(NUM_REMEMBERED):
        clock.advance(0.5)
        pace.step(1)
    assert pace.step_s() == pytest.approx(0.5), "what was long ago is forgotten"


def test_a_step_that_computes_much_of_a_prompt_takes_longer() -> None:
    clock = ManualClock()
    pace = Pace(0.002, clock)
    for num_tokens, seconds in ((1, 0.02), (100, 0.1), (1, 0.02)):
        pace.step(num_tokens)
        clock.advance(seconds)
    pace.rest()
    assert pace.step_s() == pytest.approx(0.02)
    assert pace.step_s(200) == pytest.approx(0.2)


def test_all_waits_and_copies_of_a_step_share_its_bounds() -> None:
    clock = ManualClock()
    pace = Pace(0.002, clock)
    pace.step(1)
    clock.advance(0.02)
    pace.step(1)
    clock.advance(0.02)
    assert pace.patience_s(busy=True) == pytest.approx(WAIT_SHARE * 0.02)
    pace.waited(0.0004)
    assert pace.patience_s(busy=True) == pytest.approx(WAIT_SHARE * 0.02 - 0.0004)
    pace.waited(1.0)
    assert pace.patience_s(busy=True) == pace.patience_s(busy=False) == 0.0
    most = COPY_SHARE * 0.02
    assert pace.is_short(0.6 * most, 1)
    pace.copies(0.6 * most)
    assert not pace.is_short(0.6 * most, 1)
    pace.step(1)
    assert pace.patience_s(busy=True) > 0
    assert pace.is_short(0.6 * most, 1)


def test_long_steps_are_worth_no_longer_wait_than_the_deadline() -> None:
    clock = ManualClock()
    pace = Pace(0.002, clock)
    pace.step(1)
    clock.advance(10.0)
    pace.step(1)
    assert pace.patience_s(busy=True) == 0.002


def test_the_rate_is_the_best_of_the_last_copies_and_the_slowest_workers() -> None:
    rate = Rate()
    assert rate.best() == 0.0
    rate.note(0, 1.0)
    rate.note(100, 0.0)
    assert rate.best() == 0.0
    for nbytes in (100, 300, 200):
        rate.note(nbytes, 1.0)
    assert rate.best() == 300
    for _ in range(NUM_REMEMBERED):
        rate.note(50, 1.0)
    assert rate.best() == 50
    reports = [WorkerReport({b"n"}, copy_rate=rate) for rate in (0.0, 7.0, 5.0)]
    assert reports[0].aggregate(reports[1]).aggregate(reports[2]).copy_rate == 5.0
    assert reports[0].aggregate(reports[0]).copy_rate == 0.0


class TestComputing:
    def test_nothing_is_known_at_first(self) -> None:
        assert Computing().speeds() == (0.0, 0.0)

    def test_tokens_and_pairs_are_told_apart(self) -> None:
        computing = Computing()
        for tokens, before in ((512, 0), (512, 512), (256, 1024), (512, 4096), (64, 8000)):
            pairs = tokens * (before + tokens / 2)
            computing.note(tokens, pairs, 1e-3 * tokens + 1e-7 * pairs)
        assert computing.speeds() == pytest.approx((1e-3, 1e-7))

    def test_steps_that_are_alike_say_nothing_of_pairs(self) -> None:
        computing = Computing()
        for _ in range(5):
            computing.note(512, 512 * 256, 0.5)
        token_s, pair_s = computing.speeds()
        assert pair_s == 0.0
        assert token_s == pytest.approx(0.5 / 512)

    def test_neither_is_negative(self) -> None:
        computing = Computing()
        for tokens, pairs, seconds in ((100, 1e4, 1.0), (100, 1e6, 0.5), (100, 1e5, 0.9)):
            computing.note(tokens, pairs, seconds)
        token_s, pair_s = computing.speeds()
        assert token_s > 0
        assert pair_s == 0.0

    def test_what_waited_for_something_else_does_not_count(self) -> None:
        computing = Computing()
        for before in range(0, 4096, 512):
            pairs = 512 * (before + 256)
            computing.note(512, pairs, 1e-3 * 512 + 1e-7 * pairs)
        computing.note(512, 512 * 256, 20.0)
        token_s, pair_s = computing.speeds()
        assert token_s * 512 + pair_s * 512 * 256 == pytest.approx(0.525, rel=0.5)
