"""Which codec for which tier: the ones that together save the most time, within a bound.

As AdaptCache does it (arXiv:2509.00105), method, rate and placement are chosen together: a smaller
object is moved sooner, is decoded later, and leaves room for others, which then need not come from
a slower tier or be computed. What codecs do to answers, and how fast they decode, is read from the
model's measured table; how fast a tier is, is measured on the tier.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvstrata.errors import KVStrataError
from kvstrata.quality.bound import Bound
from kvstrata.quality.table import Measured, load, path_for

RAW_BITS = 16.0


@dataclass(frozen=True)
class Place:
    """A tier to choose a codec for.

    Args:
        name: of the tier.
        capacity_bytes: of objects as they are stored.
        bytes_per_s: what reading from it brings, encoded, all its threads together.
        cores: that may decode at once.
    """

    name: str
    capacity_bytes: int
    bytes_per_s: float
    cores: int


@dataclass(frozen=True)
class Candidate:
    """A codec as far as the choice goes; ``decode_bytes_per_s`` of raw KV, of one core."""

    name: str
    bits: float
    decode_bytes_per_s: float

    def load_s(self, place: Place) -> float:
        """Seconds until a byte of raw KV is back.

        Moving and decoding overlap, but a fast tier keeps the cores busy too, so that the sum is
        what was seen there; behind a slow one it is little more than the larger of the two.
        """
        moving = self.bits / RAW_BITS / place.bytes_per_s
        return moving + 1 / (self.decode_bytes_per_s * place.cores)

    def share(self, place: Place, wanted_bytes: float) -> float:
        """Part of the raw KV that is wanted which the tier holds."""
        return min(1.0, place.capacity_bytes * RAW_BITS / self.bits / wanted_bytes)


RAW = Candidate("raw", RAW_BITS, math.inf)


def allowed(rows: Iterable[Measured], bound: Bound) -> list[Measured]:
    """The lossy codecs of a table that keep the bound, over all its lengths together."""
    return [row for row in rows if not row.lossless and bound.meets(row.at())]


def trouble(weights: str, bound: Bound, model: str) -> str:
    """Why ``auto`` stores a model's KV losslessly, and what mends it; empty where it need not.

    Args:
        weights: `kvstrata.identity.weights_identity` of the model.
        bound: the operator's.
        model: its folder, for the command.
    """
    if ":" in weights:
        return f"{model} is no local folder: kvstrata quality, and auto, need one"
    path = path_for(weights)
    if not path.exists():
        why = f"no table says what codecs do to this model ({path})"
        return f"{why}; make it: kvstrata quality {model}"
    try:
        table = load(path)
    except (OSError, KVStrataError) as error:
        return f"{error}; make it again: kvstrata quality {model}"
    if not allowed(table.codecs, bound):
        return f"no lossy codec in {path} keeps {bound}"
    return ""


def candidates(rows: Sequence[Measured]) -> list[Candidate]:
    """What may be chosen: raw, and these rows of a table."""
    return [
        RAW,
        *(Candidate(row.name, row.at().bits, max(row.decode_gbps, 1e-3) * 1e9) for row in rows),
    ]


def choose(
    options: Sequence[Candidate], places: Sequence[Place], compute_s: float
) -> Mapping[str, str]:
    """The codec of each tier, by the tier's name.

    What is wanted is as much KV as all options could ever make fit into the largest tier, each
    byte of it equally often. A faster tier holds a part of what the slower ones hold.

    Args:
        options: see `candidates`.
        places: the tiers, fastest first.
        compute_s: what computing a byte of raw KV takes, in seconds.
    """
    densest = min(option.bits for option in options)
    wanted = max(place.capacity_bytes for place in places) * RAW_BITS / densest

    def expected_s(chosen: Sequence[Candidate]) -> float:
        total, held = 0.0, 0.0
        for option, place in zip(chosen, places, strict=True):
            share = option.share(place, wanted)
            # A codec that is slower than computing is of no use, and would not be waited for.
            total += max(0.0, share - held) * min(option.load_s(place), compute_s)
            held = max(held, share)
        return total + (1 - held) * compute_s

    best = min(itertools.product(options, repeat=len(places)), key=expected_s)
    return {place.name: option.name for place, option in zip(places, best, strict=True)}
