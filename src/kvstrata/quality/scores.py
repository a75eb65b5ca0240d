"""From samples of windows to scores with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvstrata.quality.metrics import estimate
from kvstrata.quality.samples import Sample
from kvstrata.quality.table import Estimate, Scores

RELIABLE = 0.8
"""A depth of a length counts for retrieval if the exact cache finds so many of its facts."""

Drawn: TypeAlias = Sequence[Sequence[Sample]]
"""For each window, its samples."""


def scores(windows: Drawn, length: int) -> Scores:
    """The scores of one codec.

    Args:
        windows: for each window the samples of all lengths.
        length: only of these contexts; 0 takes all.
    """
    chosen = [[s for s in window if length in (0, s.length)] for window in windows]

    def mean(value: Callable[[Sample], float]) -> list[float]:
        return [float(np.mean([value(sample) for sample in window])) for window in chosen]

    def of(value: Callable[[Sample], float]) -> Estimate:
        return estimate(mean(value), _mean)

    places = len(chosen[0][0].rules)
    return Scores(
        length=length,
        bits=_mean(mean(lambda s: s.bits)),
        key_error=_mean(mean(lambda s: s.key_error)),
        value_error=_mean(mean(lambda s: s.value_error)),
        perplexity=estimate(mean(lambda s: s.loss), lambda drawn: math.expm1(_mean(drawn))),
        kl_mean=of(lambda s: float(s.kl.mean())),
        kl_p99=estimate([np.concatenate([s.kl for s in window]) for window in chosen], _p99),
        agreement=of(lambda s: s.agreement),
        retrieval=_retrieval(chosen),
        rules=of(lambda s: float(np.mean(s.rules))),
        rules_nats=of(lambda s: float(np.mean(s.rules_nats))),
        rules_by_place=tuple(
            _mean([s.rules[place] for window in chosen for s in window]) for place in range(places)
        ),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _p99(drawn: Sequence[npt.NDArray[np.float64]]) -> float:
    return float(np.quantile(np.concatenate(drawn), 0.99))


def _retrieval(windows: Drawn) -> Estimate | None:
    """Facts found over facts that the exact cache finds, where it can be relied on."""
    exact = np.array([[s.exact_found for s in window] for window in windows])
    found = np.array([[s.found for s in window] for window in windows])
    cells = exact.mean(axis=0) >= RELIABLE
    if not cells.any():
        return None
    pairs = list(zip(found[:, cells].sum(axis=1), exact[:, cells].sum(axis=1), strict=True))
    return estimate(
        pairs, lambda drawn: float(sum(f for f, _ in drawn) / max(1, sum(e for _, e in drawn)))
    )
