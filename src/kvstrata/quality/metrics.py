"""How far answers from a decoded cache are from those of the exact one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.elements import Floats
from kvstrata.quality.table import Estimate

T = TypeVar("T")

_RESAMPLES = 1000
_POSITIONS = 4


def estimate(windows: Sequence[T], statistic: Callable[[Sequence[T]], float]) -> Estimate:
    """A statistic of all windows, with a bootstrap over them: windows are independent, the
    tokens of one are not. Of a single window the interval is the value.
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(windows), (_RESAMPLES if len(windows) > 1 else 1, len(windows)))
    values = [statistic([windows[i] for i in row]) for row in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(statistic(windows)), float(low), float(high))


def divergence(exact: Floats, decoded: Floats) -> npt.NDArray[np.float64]:
    """KL(exact || decoded) in nats, for each position.

    Args:
        exact: (positions, vocabulary), natural logarithms of probabilities.
        decoded: the same of the other cache.
    """
    kl = np.empty(len(exact))
    # A few positions at a time: a vocabulary of 262,144 would fill the memory with what is between.
    for begin in range(0, len(exact), _POSITIONS):
        part = slice(begin, begin + _POSITIONS)
        terms = np.exp(exact[part]) * (exact[part] - decoded[part])
        kl[part] = terms.sum(axis=1, dtype=np.float64)
    # Rounding may leave a little less than nothing.
    return kl.clip(0.0)


def loss(predictions: Floats, tokens: Sequence[int]) -> float:
    """Mean negative log likelihood of the tokens, in nats."""
    return -float(predictions[np.arange(len(tokens)), tokens].mean(dtype=np.float64))


def agreement(predictions: Floats, tokens: Sequence[int]) -> float:
    """Share of positions whose most likely token is the given one."""
    return float((predictions.argmax(axis=-1) == np.asarray(tokens)).mean())
