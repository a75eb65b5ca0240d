"""Which of the reused tokens are computed anew: the same answer for the same numbers, everywhere.

A token whose KV was computed behind another text lacks what it would have seen of this one. A few
of them, computed anew, bring back some of that; a plan says which. Ranks choose alike, since all of
it is plain arithmetic on numbers that they share.

Sources: CacheBlend, arXiv:2405.16444 (`deviation`; differs: a bound on what is left may say how
many instead of a ratio); KVShare, arXiv:2503.16525 (`share`; differs: its first stage alone, since
a second one computes tokens anew while the answer is written, which no stock engine's decode can);
EPIC, arXiv:2410.15332 (`edges`: its first tokens of each text, here with a few of the last ones, as
KVLink, arXiv:2502.16002, has its link tokens, untrained); `random` is what all have to beat at as
many tokens. `anchors` takes as `edges` does: it differs in what is reused
(`kvstrata.blend.anchors`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstrata.errors import UsageError

PLANS = ("edges", "anchors", "deviation", "share", "random", "all", "none")
BY_DEVIATION = ("deviation", "share")
"""Those that must know how far each reused token is off."""

AT_END = 8
"""`edges` spends one of so many tokens at the end of a stretch, the others at its beginning."""


class Rule(NamedTuple):
    """What is computed anew, as `choose` takes it."""

    plan: str
    ratio: float
    bound: float | None = None

    def __str__(self) -> str:
        bound = "" if self.bound is None else f" bound {self.bound:g}"
        return f"{self.plan} {self.ratio:g}{bound}"


def stretches(pieces: Iterable[tuple[int, int, int]], first: int) -> list[range]:
    """The reused tokens of a prompt, cut where what lies side by side was computed apart.

    Args:
        pieces: position in this prompt, position in the one it was computed in, and count of each
            piece, by ascending position. Pieces that follow each other in both prompts are one.
        first: position of the first token that is not exact; what lies before is not reused, it is
            simply there.
    Raises:
        UsageError: pieces overlap, or are not in order.
    """
    found: list[range] = []
    end = shift = 0
    for position, was, count in pieces:
        if position < end or count < 1 or was < 0:
            raise UsageError(f"piece of {count} tokens at {position}: expected {end} or later")
        start, stop = max(position, first), position + count
        if start < stop:
            if found and found[-1].stop == start and shift == position - was:
                found[-1] = range(found[-1].start, stop)
            else:
                found.append(range(start, stop))
        end, shift = stop, position - was
    return found


def budget(plan: str, ratio: float, num_reused: int) -> int:
    """How many of the reused tokens a plan computes anew; by ``share`` or a bound, at most.

    Args:
        plan: one of `PLANS`; ``all`` and ``none`` take no notice of the ratio.
        ratio: the part of them, 0 to 1.
        num_reused: how many there are.
    Raises:
        UsageError: there is no such plan or ratio.
    """
    if plan not in PLANS:
        raise UsageError(f"no plan {plan!r}: expected one of {', '.join(PLANS)}")
    if not 0 <= ratio <= 1:
        raise UsageError(f"ratio {ratio}: expected 0 to 1")
    if plan in ("all", "none"):
        return num_reused if plan == "all" else 0
    return min(num_reused, math.floor(ratio * num_reused + 0.5))


def choose(
    plan: str,
    ratio: float,
    reused: Sequence[range],
    deviation: npt.NDArray[np.floating[Any]] | None = None,
    seed: int = 0,
    bound: float | None = None,
) -> list[int]:
    """Positions of the reused tokens to compute anew, ascending.

    Args:
        plan: one of `PLANS`. ``edges`` takes as many of each stretch, its first ones and a few of
            its last, and so does ``anchors``; ``deviation`` those whose KV differs most from what
            it would be here; ``share`` those of them that are off by more than a standard deviation
            above the mean.
        ratio: the part of the reused tokens, 0 to 1; by ``share`` or a bound, at most.
        reused: as of `stretches`: positions, ascending and disjoint.
        deviation: of each of these tokens in that order, how much it differs, 0 or more; what is no
            number counts as most of all, and neither in a sum nor in a mean. For `BY_DEVIATION`.
        seed: for ``random`` alone.
        bound: for ``deviation`` alone: no more tokens than it takes that the deviations of all that
            are left add up to at most this part, 0 to 1, of the deviations of all.
    Raises:
        UsageError: there is no such plan, ratio or bound, or not one deviation for each token.
    """
    num_reused = sum(map(len, reused))
    count = budget(plan, ratio, num_reused)
    if bound is not None and not (plan == "deviation" and 0 <= bound <= 1):
        raise UsageError(f"bound {bound} of plan {plan}: expected 0 to 1, of plan deviation")
    if plan in ("edges", "anchors"):
        return _edges(reused, count)
    positions = np.concatenate([np.arange(0), *(np.arange(r.start, r.stop) for r in reused)])
    if plan in BY_DEVIATION:
        shape = None if deviation is None else deviation.shape
        if deviation is None or shape != (num_reused,):
            raise UsageError(f"deviations of shape {shape}, not one for each of {num_reused}")
        off = np.where(np.isnan(deviation), np.inf, deviation.astype(np.float64))
        if plan == "share":
            count = min(count, _num_high(off))
        elif bound is not None:
            count = min(count, _num_beyond(off, bound))
        # Of equal ones the first counts, on every rank.
        chosen = positions[np.argsort(-off, kind="stable")[:count]]
    elif plan == "random":
        picked = random.Random(seed).sample(range(num_reused), count)
        chosen = positions[np.array(picked, np.int64)]
    else:
        chosen = positions[:count]
    return [int(position) for position in np.sort(chosen)]


def _num_high(off: npt.NDArray[np.float64]) -> int:
    """How many are more than a standard deviation above the mean."""
    numbers = off[np.isfinite(off)]
    if not len(numbers):
        return len(off)
    return len(off) - int((numbers <= numbers.mean() + numbers.std()).sum())


def _num_beyond(off: npt.NDArray[np.float64], bound: float) -> int:
    """How many, worst first, are too many to leave if this part of the sum may be left."""
    left = np.cumsum(np.sort(off[np.isfinite(off)]))
    if not len(left):
        return len(off)
    return len(off) - int(np.searchsorted(left, bound * left[-1], side="right"))


def _edges(reused: Sequence[range], count: int) -> list[int]:
    """The same number of each stretch, if it has so many; the first ones get what is over."""
    each, left = 0, count
    for done, length in enumerate(sorted(map(len, reused))):
        # All that are left are at least as long as this one.
        each = min(length, left // (len(reused) - done))
        if each < length:
            left -= each * (len(reused) - done)
            break
        left -= length
    chosen: list[int] = []
    for stretch in reused:
        share = min(len(stretch), each)
        if left and share < len(stretch):
            share += 1
            left -= 1
        at_end = share // AT_END
        chosen += stretch[: share - at_end]
        chosen += stretch[len(stretch) - at_end :]
    return chosen
