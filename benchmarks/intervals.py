"""Ratios of percentiles, and how far they vary from round to round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.common import expect


@dataclass(frozen=True)
class Interval:
    """A ratio, and a 95% bootstrap interval of it over rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"95% CI {self.low:.3f} to {self.high:.3f}"


def over_rounds(
    rounds: int, ratio: Callable[[Sequence[int]], float], seed: int = 0, draws: int = 1000
) -> Interval:
    """A ratio of all rounds, and how it varies where rounds are drawn anew.

    Args:
        ratio: of the rounds with these numbers, some of which may come twice.
    """
    rng = np.random.default_rng(seed)
    drawn = [ratio(rng.integers(rounds, size=rounds).tolist()) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(ratio(range(rounds)), float(low), float(high))


def percentile_ratio(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], percent: float
) -> Interval:
    """A percentile over another's, both of all rounds; one sequence a round."""

    def ratio(numbers: Sequence[int]) -> float:
        mine, other = (np.concatenate([each[i] for i in numbers]) for each in (ours, theirs))
        return float(np.percentile(mine, percent) / np.percentile(other, percent))

    expect(len(ours) == len(theirs), "some rounds are not in pairs")
    return over_rounds(len(ours), ratio)
