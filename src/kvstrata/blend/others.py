"""Two published ways to mend reused KV that the engine does not offer, to measure ours against.

Both lost something here that their papers have; each function says what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstrata.blend.plans import budget, choose


def high_deviation(
    ratio: float, reused: Sequence[range], deviation: npt.NDArray[np.floating[Any]]
) -> list[int]:
    """Positions of the tokens that deviate by more than a standard deviation above the mean.

    Args:
        ratio: the part of the reused tokens that may be chosen, 0 to 1: the worst ones then.
        reused: positions, ascending and disjoint.
        deviation: of each of these tokens in that order.
    Returns:
        Positions, ascending; none where all deviate alike.
    Raises:
        UsageError: as `kvstrata.blend.plans.choose`.
    Source: KVShare, arXiv:2503.16525; differs: its first stage alone. A second one computes tokens
    anew while the answer is written, which no stock engine's decode can.
    """
    num_reused = sum(map(len, reused))
    high = int((deviation > deviation.mean() + deviation.std()).sum()) if num_reused else 0
    count = min(high, budget("deviation", ratio, num_reused))
    return choose("deviation", count / max(1, num_reused), reused, deviation)


def anchor_weights(
    prefix: npt.NDArray[np.floating[Any]], anchors: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.float64]:
    """How much each KV that a text was seen with counts behind another prefix; 1 in all.

    Args:
        prefix: (D,), an embedding of what now lies before the text.
        anchors: (A, D), of what lay before it where it was seen.
    Returns:
        (A,): softmax of the negative distances, in units of their mean.
    Source: KVCOMM, arXiv:2510.12872, which adds the offsets that similar texts showed to the KV of
    a text that was computed without any prefix. Differs: a text's own KV behind other prefixes is
    taken, which is there once it was stored more than once; what it was without a prefix cancels.
    """
    distances = np.linalg.norm(anchors - prefix, axis=1).astype(np.float64)
    scale = distances.mean()
    weights: npt.NDArray[np.float64] = np.exp(-distances / scale if scale > 0 else distances)
    weights /= weights.sum()
    return weights
