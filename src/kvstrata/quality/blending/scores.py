"""From samples of windows to rows with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvstrata.blend import Rule
from kvstrata.quality.blending.samples import Sample
from kvstrata.quality.blending.table import Row
from kvstrata.quality.metrics import estimate
from kvstrata.quality.scores import RELIABLE
from kvstrata.quality.table import Estimate

_CHOOSING = ("edges", "deviation", "share")  # what is compared with as many random tokens
NONE = Rule("none", 0.0)

Samples = Sequence[Sample]
"""Of one way, for each window."""


def scored(
    of: Mapping[Rule, Samples],
    found: Sequence[Sequence[bool]],
    own_gap: Collection[str] = (),
) -> tuple[Row, ...]:
    """The rows of a table.

    Args:
        of: samples by what each went by; of ``none`` too.
        found: for each window, whether the exact cache finds each document's fact.
        own_gap: plans whose gap is their own at ratio 0.
    """
    random = {rule.ratio: _kl(samples) for rule, samples in of.items() if rule.plan == "random"}
    random[0.0] = _kl(of[NONE])
    rows = []
    for rule, samples in of.items():
        gap = _kl(of[Rule(rule.plan, 0.0)]) if rule.plan in own_gap else random[0.0]
        rows.append(_row(rule, samples, gap, random, np.array(found)))
    return tuple(rows)


def _row(
    rule: Rule,
    samples: Samples,
    gap: npt.NDArray[np.float64],
    random: Mapping[float, npt.NDArray[np.float64]],
    exact_found: npt.NDArray[np.bool_],
) -> Row:
    def of(value: Callable[[Sample], float]) -> Estimate:
        return estimate([value(sample) for sample in samples], _mean)

    kl = _kl(samples)
    computed = _mean([sample.computed for sample in samples])
    beats = rule.plan in _CHOOSING and 0 < computed <= max(random)
    return Row(
        plan=rule.plan,
        ratio=rule.ratio,
        bound=rule.bound,
        computed=computed,
        kl_mean=estimate(list(kl), _mean),
        kl_p95=estimate([sample.kl for sample in samples], _p95),
        closed=_closed(kl, gap),
        over_random=(
            _closed(kl, _at(random, [sample.computed for sample in samples])) if beats else None
        ),
        perplexity=estimate([s.loss for s in samples], lambda drawn: math.expm1(_mean(drawn))),
        agreement=of(lambda s: s.agreement),
        answer_nats=of(lambda s: _mean(s.answer_nats)),
        retrieval=_retrieval(samples, exact_found),
        found=tuple(float(share) for share in np.mean([s.found for s in samples], axis=0)),
    )


def _kl(samples: Samples) -> npt.NDArray[np.float64]:
    """Mean of each window."""
    return np.array([sample.kl.mean() for sample in samples])


def _at(
    random: Mapping[float, npt.NDArray[np.float64]], computed: Sequence[float]
) -> npt.NDArray[np.float64]:
    """For each window the KL of so many random tokens, between the ratios that were measured."""
    ratios = sorted(random)
    return np.array(
        [
            np.interp(share, ratios, [random[ratio][window] for ratio in ratios])
            for window, share in enumerate(computed)
        ]
    )


def _closed(kl: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> Estimate:
    """Share of another KL that is gone: of sums, since single windows may have next to none."""

    def share(drawn: Sequence[tuple[float, float]]) -> float:
        ours, theirs = np.sum(drawn, axis=0)
        return float(1 - ours / theirs) if theirs > 0 else 0.0

    return estimate(list(zip(kl.tolist(), other.tolist(), strict=True)), share)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _p95(drawn: Sequence[npt.NDArray[np.float64]]) -> float:
    return float(np.quantile(np.concatenate(drawn), 0.95))


def _retrieval(samples: Samples, exact: npt.NDArray[np.bool_]) -> Estimate | None:
    """Facts found over facts that the exact cache finds, where it can be relied on."""
    found = np.array([sample.found for sample in samples])
    reliable = exact.mean(axis=0) >= RELIABLE
    if not reliable.any():
        return None
    pairs = zip(found[:, reliable].sum(axis=1), exact[:, reliable].sum(axis=1), strict=True)
    return estimate(
        list(pairs),
        lambda drawn: float(sum(f for f, _ in drawn) / max(1, sum(e for _, e in drawn))),
    )
