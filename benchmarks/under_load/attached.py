"""What KVStrata costs requests that vLLM's own cache covers, with 2, 4 and 8 in flight.

Three engines take turns: with KVStrata, without, and without once more, which shows how far two
equal processes are apart.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import numpy as np
from benchmarks.common import Ledger, Options, Prompts, Row, geometric_mean, main, say, spread
from benchmarks.intervals import Interval, over_rounds
from benchmarks.under_load.clients import (
    ENGINE,
    IN_FLIGHT,
    MOST_DOCUMENTS,
    NAME,
    Clients,
    Times,
)
from benchmarks.under_load.serving import Serving

from kvstrata.testing.workplace import Workplace

WITH, WITHOUT, CONTROL = "with KVStrata", "without", "without, second process"
BOUND = 1.03


def over_the_others(times: Times, who: str, others: Sequence[str], percent: float) -> Interval:
    """A percentile of one engine's times over the geometric mean of the others'."""

    def ratio(numbers: Sequence[int]) -> float:
        def percentile(name: str) -> float:
            firsts = np.concatenate([times.by[name][i].firsts for i in numbers])
            return float(np.percentile(firsts, percent))

        theirs = np.exp(np.mean([np.log(percentile(other)) for other in others]))
        return percentile(who) / float(theirs)

    return over_rounds(len(times.by[who]), ratio)


def rows_of(in_flight: int, times: Times) -> list[Row]:
    """The rows of one concurrency."""
    at = f"own hits, {in_flight} in flight"
    rows = []
    for name, percent in (("median", 50), ("p90", 90)):
        found = over_the_others(times, WITH, [WITHOUT, CONTROL], percent)
        same = over_the_others(times, CONTROL, [WITHOUT], percent)
        ms = [1e3 * np.percentile(times.firsts(who), percent) for who in (WITH, WITHOUT, CONTROL)]
        detail = f"{found}; {ms[0]:.0f}, {ms[1]:.0f} and {ms[2]:.0f} ms"
        what = f"{at}, {name} of time to first token: with KVStrata / without"
        rows.append(Row(NAME, what, found.value, BOUND, detail=detail))
        what = f"control: {at}, {name}: without / without"
        rows.append(Row(NAME, what, same.value, None, detail=str(same)))
    ours, one, other = (
        [turn.seconds for turn in times.by[who]] for who in (WITH, WITHOUT, CONTROL)
    )
    slower = spread(
        mine / geometric_mean(theirs) for mine, *theirs in zip(ours, one, other, strict=True)
    )
    seconds = [spread(each).median for each in (ours, one, other)]
    rows.append(
        Row(
            NAME,
            f"{at}, whole turns: with KVStrata / without",
            slower.median,
            None,
            detail=f"{slower}; {', '.join(f'{each:.2f}' for each in seconds)} s",
        )
    )
    return rows


def measure(options: Options) -> list[Row]:
    """The rows of vLLM's own hits."""
    prompts = Prompts(options.seed)
    documents, rounds = (8, 3) if options.quick else (MOST_DOCUMENTS, 12)
    rng = random.Random(options.seed)
    order = list(range(documents))
    times = {in_flight: Times() for in_flight in IN_FLIGHT}
    with Workplace(prompts.model, {"host.capacity": "2GiB"}) as place:
        engines = {
            WITH: place.engine_of(Serving, ENGINE),
            WITHOUT: place.engine_of(Serving, ENGINE, with_kvstrata=False),
            CONTROL: place.engine_of(Serving, ENGINE, with_kvstrata=False),
        }
        for engine in engines.values():
            engine.wait()
        texts = prompts.make(documents)
        ledger = Ledger(place.client())
        asked = {
            who: Clients(engine, ledger if who == WITH else None, texts)
            for who, engine in engines.items()
        }
        for clients in asked.values():
            clients.store()
        asked[WITH].compare_alone()
        for number in range(rounds):
            rng.shuffle(order)
            names = list(asked)[number % 3 :] + list(asked)[: number % 3]
            for in_flight in IN_FLIGHT:
                for who in names:
                    times[in_flight].add(who, asked[who].own(order, in_flight))
            say(f"round {number + 1} of {rounds}")
        say(asked[WITH].agreement())
    rows = []
    for in_flight in IN_FLIGHT:
        times[in_flight].tell(f"vLLM's own hits, {in_flight} in flight")
        rows += rows_of(in_flight, times[in_flight])
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
