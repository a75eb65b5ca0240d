"""Warm answers beside vLLM's own prefix hits, with 2, 4 and 8 requests in flight, in one engine."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from benchmarks.common import Ledger, Options, Prompts, Row, main, say, spread
from benchmarks.intervals import over_rounds, percentile_ratio
from benchmarks.under_load.clients import (
    ENGINE,
    IN_FLIGHT,
    MOST_DOCUMENTS,
    NAME,
    Clients,
    Times,
    pairs,
)
from benchmarks.under_load.serving import Serving

from kvstrata.testing.workplace import Workplace

WARM, OWN, AGAIN, LAST = "warm", "own", "own again", "warm again"
NUM_RUNNING = 2
GAPS_TIMES = 3
"""Turns of gaps in a round: of those of one, the last hundredth would be five in a whole run."""


def round_of(
    clients: Clients, order: Sequence[int], in_flight: int, times: Times, **more: Any
) -> None:
    """Warm, own, own, warm: no drift takes sides, and the two in the middle are the control."""
    times.add(WARM, clients.warm(order, in_flight, **more))
    times.add(OWN, clients.own(order, in_flight, **more))
    times.add(AGAIN, clients.own(order, in_flight, **more))
    times.add(LAST, clients.warm(order, in_flight, **more))


def rows_of(in_flight: int, times: Times, how: str) -> list[Row]:
    """The rows of one concurrency."""
    by = times.by
    both = zip(by[WARM], by[OWN], by[AGAIN], by[LAST], strict=True)
    warm = [pairs(a, b) + pairs(d, c) for a, b, c, d in both]
    # Which of two equal turns is divided by which must not matter to its tail.
    control = [pairs(c, b) + pairs(b, c) for b, c in zip(by[OWN], by[AGAIN], strict=True)]
    found = spread(ratio for each in warm for ratio in each)
    same = spread(ratio for each in control for ratio in each[: len(each) // 2])

    def tails(numbers: Sequence[int]) -> float:
        ours, theirs = (np.concatenate([each[i] for i in numbers]) for each in (warm, control))
        return float(np.percentile(ours, 90) / np.percentile(theirs, 90))

    tail = over_rounds(len(warm), tails)
    p90 = percentile_ratio(
        [a.firsts + d.firsts for a, d in zip(by[WARM], by[LAST], strict=True)],
        [b.firsts + c.firsts for b, c in zip(by[OWN], by[AGAIN], strict=True)],
        90,
    )
    four = zip(by[WARM], by[OWN], by[AGAIN], by[LAST], strict=True)
    rates = [(b.seconds + c.seconds) / (a.seconds + d.seconds) for a, b, c, d in four]
    rate = spread(rates)
    count = len(by[WARM][0].replies)
    per_second = [spread(count / turn.seconds for turn in by[who]).median for who in (WARM, OWN)]
    at = f"{in_flight} in flight"
    ms = [1e3 * spread(times.firsts(who)).median for who in (WARM, OWN)]
    return [
        Row(
            NAME,
            f"warm / vLLM's own hit, {at}: time to first token",
            found.median,
            1.10,
            detail=f"{found}; {ms[0]:.0f} and {ms[1]:.0f} ms; {how}",
        ),
        Row(NAME, f"control: own hit / own hit, {at}", same.median, None, detail=str(same)),
        Row(
            NAME,
            f"the same, {at}: p90 of the pairs / p90 of the control's",
            tail.value,
            1.10,
            detail=f"{tail}; p90 of the times over each other {p90.value:.3f}, {p90}",
        ),
        Row(
            NAME,
            f"warm / vLLM's own hit, {at}: requests per second",
            rate.median,
            0.92,
            at_most=False,
            detail=f"{rate}; {per_second[0]:.1f} and {per_second[1]:.1f} a second",
        ),
    ]


def running_rows(times: Times) -> list[Row]:
    """Gaps between the tokens of requests that run while others come."""
    by = times.by
    warm = [a.running_gaps_s + d.running_gaps_s for a, d in zip(by[WARM], by[LAST], strict=True)]
    own = [b.running_gaps_s + c.running_gaps_s for b, c in zip(by[OWN], by[AGAIN], strict=True)]
    rows = []
    for percent, bound in ((50, None), (99, 1.10)):
        found = percentile_ratio(warm, own, percent)
        ms = [1e3 * np.percentile(np.concatenate(each), percent) for each in (warm, own)]
        rows.append(
            Row(
                NAME,
                f"gaps between tokens of running requests, p{percent}: "
                "while others load / while they hit vLLM's own cache",
                found.value,
                bound,
                detail=f"{found}; {ms[0]:.1f} and {ms[1]:.1f} ms, "
                f"n = {sum(map(len, warm))} and {sum(map(len, own))}",
            )
        )
    return rows


def measure(options: Options) -> list[Row]:
    """The rows of warm answers."""
    prompts = Prompts(options.seed)
    documents, rounds = (8, 2) if options.quick else (MOST_DOCUMENTS, 8)
    rng = random.Random(options.seed)
    order = list(range(documents))
    times = {in_flight: Times() for in_flight in IN_FLIGHT}
    how: dict[int, Counter[str]] = {in_flight: Counter() for in_flight in IN_FLIGHT}
    gaps = Times()
    with Workplace(prompts.model, {"host.capacity": "2GiB"}) as place:
        engine = place.engine_of(Serving, ENGINE)
        engine.wait()
        clients = Clients(engine, Ledger(place.client()), prompts.make(documents))
        clients.store()
        clients.compare_alone()
        running = prompts.make(NUM_RUNNING, collection=1, tokens=32)
        for number in range(rounds):
            rng.shuffle(order)
            for in_flight in IN_FLIGHT:
                clients.how.clear()
                round_of(clients, order, in_flight, times[in_flight])
                how[in_flight] += clients.how
            for _ in range(GAPS_TIMES):
                round_of(clients, order, 2, gaps, max_tokens=1, running=running)
            say(f"round {number + 1} of {rounds}")
        agreement = clients.agreement()
    rows = []
    for in_flight in IN_FLIGHT:
        times[in_flight].tell(f"{in_flight} in flight")
        loads = ", ".join(f"{n} {word}" for word, n in sorted(how[in_flight].items()))
        rows += rows_of(in_flight, times[in_flight], f"loads: {loads}")
    say(agreement)
    return rows + running_rows(gaps)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
