"""Do prompts go where their prefix is, without some nodes having more to do than others?"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import Options, Row, expect, main, say
from benchmarks.policies.run import replay
from benchmarks.routing.affinity import LongestPrefix, PureAffinity
from benchmarks.routing.fleet import Machine, Outcome, simulate
from benchmarks.routing.trace import Request, read

from kvstrata.policies import create_policy
from kvstrata.routing import CacheAware, LeastLoad, Policy, RoundRobin

NAME = "routing"
NODES = 8
NAMINGS = 5
CACHE_TOKENS = 1_000_000
HIT_BOUND, LOAD_BOUND = 0.95, 1.25
KNOWN_RATES = {1: 0.056, 4: 0.185, 16: 0.342, 1 << 20: 0.374}
"""Hit rates by token of one cache of so many times 2**20 tokens, by an independent reading of this
trace; this reading must come out there."""
PICTURE = Path("build/routing.png")

AFFINITY, FLEET = "pure affinity", "cache-aware, the fleet's caches known"


@dataclass(frozen=True)
class Way:
    """A policy, and whether it is told what each node has."""

    make: Callable[[], Policy]
    knows: bool = False


WAYS = {
    "round robin": Way(RoundRobin),
    "least load": Way(LeastLoad),
    AFFINITY: Way(PureAffinity),
    "longest prefix": Way(LongestPrefix, knows=True),
    FLEET: Way(CacheAware, knows=True),
    "cache-aware, by its memory": Way(lambda: CacheAware(CACHE_TOKENS)),
    "cache-aware, caches taken for 4 times as large": Way(lambda: CacheAware(4 * CACHE_TOKENS)),
}


def names(number: int) -> list[str]:
    """Of all nodes; others hash to other places."""
    return [f"10.0.{number}.{node}:8000" for node in range(NODES)]


def check(requests: Sequence[Request], capacities: Sequence[int]) -> None:
    """The trace is read as others read it."""
    lines = [(request.input_tokens, list(request.blocks)) for request in requests]
    for millions in capacities:
        rate = replay(lines, create_policy("lru", millions << 20))
        expect(abs(rate - KNOWN_RATES[millions]) < 0.001, f"{millions}M tokens: {rate:.4f}")


def median(outcomes: Sequence[Outcome], figure: Callable[[Outcome], float]) -> float:
    """Of one figure over all namings."""
    return float(np.median([figure(outcome) for outcome in outcomes]))


def worst_load(outcome: Outcome) -> float:
    """Largest load over the mean, 95th percentile of the windows."""
    return float(np.percentile(outcome.imbalance(), 95))


def percentiles(outcomes: Sequence[Outcome]) -> str:
    """Of the simulated time to first token."""
    found = np.median([np.percentile(one.first_s, [50, 90, 99]) for one in outcomes], axis=0)
    return "first token p50 {:.2f}, p90 {:.2f}, p99 {:.2f} s".format(*found)


def between(values: Sequence[float]) -> str:
    """The least and the greatest."""
    return f"{min(values):.3f} to {max(values):.3f} in {len(values)} namings"


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    requests = read()
    check(requests, [1 << 20] if options.quick else list(KNOWN_RATES))
    count = 1 if options.quick else NAMINGS
    seeds = range(options.seed * NAMINGS, options.seed * NAMINGS + count)
    found: dict[str, list[Outcome]] = {}
    for name, way in WAYS.items():
        found[name] = [
            simulate(requests, names(seed), Machine(CACHE_TOKENS), way.make, way.knows)
            for seed in seeds
        ]
        say(f"{name}: hit rate {median(found[name], lambda one: one.hit_rate):.4f}, "
            f"load {median(found[name], worst_load):.3f}, {percentiles(found[name])}")  # fmt: skip
    draw(found)
    rows = []
    for name, outcomes in found.items():
        ratios = [
            one.hit_rate / base.hit_rate
            for one, base in zip(outcomes, found[AFFINITY], strict=True)
        ]
        loads = [worst_load(one) for one in outcomes]
        judged = name == FLEET
        rate = median(outcomes, lambda one: one.hit_rate)
        rows.append(
            Row(
                NAME,
                f"{name}: hit rate / {AFFINITY}",
                float(np.median(ratios)),
                HIT_BOUND if judged else None,
                at_most=False,
                detail=f"{between(ratios)}; {rate:.1%} of all prompt tokens",
            )
        )
        busy = median(outcomes, lambda one: one.busy)
        rows.append(
            Row(
                NAME,
                f"{name}: largest load / mean in 60 s, 95th percentile",
                float(np.median(loads)),
                LOAD_BOUND if judged else None,
                detail=f"{between(loads)}; {percentiles(outcomes)}; nodes busy {busy:.0%}",
            )
        )
    return rows


def draw(found: dict[str, list[Outcome]]) -> None:
    """Hit rate over balance, and how long the first token takes."""
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        return
    figure = figures.Figure(figsize=(10, 4.2), layout="constrained")
    places, times = figure.subplots(1, 2)
    for name, outcomes in found.items():
        thick = 2.5 if name == FLEET else 1.2
        x = median(outcomes, worst_load)
        y = median(outcomes, lambda one: one.hit_rate)
        places.plot(x, y, "o", markersize=4 * thick, label=name)
        first = np.percentile(outcomes[0].first_s, np.arange(1, 100))
        times.plot(first, np.arange(1, 100), linewidth=thick, label=name)
    places.axvline(LOAD_BOUND, color="gray", linestyle=":", linewidth=1)
    rate = median(found[AFFINITY], lambda one: one.hit_rate)
    places.axhline(HIT_BOUND * rate, color="gray", linestyle=":", linewidth=1)
    places.set_xlabel("largest load / mean in 60 s, 95th percentile")
    places.set_ylabel("hit rate by token")
    times.set_xscale("log")
    times.set_xlabel("simulated time to first token, s")
    times.set_ylabel("% of requests")
    times.legend(fontsize="small")
    for axes in (places, times):
        axes.grid(alpha=0.3)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    say(f"the picture is {PICTURE}")


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
