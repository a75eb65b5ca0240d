"""Loads with a target, over links that are slow, or slow down on the way.

The workload of `encoded_disk`. Baseline: the same lossless tier, loads taking what they take.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.common import (
    DOCUMENT_TOKENS,
    Options,
    Prompts,
    Row,
    disk_folder,
    expect,
    main,
    milliseconds,
    say,
    spread,
)
from benchmarks.encoded_disk.run import QUESTION
from benchmarks.long_document_qa.run import Asker, start

from kvstrata.testing.engine import Answer
from kvstrata.testing.workplace import SERVE, Workplace

NAME = "streaming"
NUM_DOCUMENTS = 4
TARGET_S = 0.45
DROP_S = 0.1
PAUSE_S = 1.5
COARSER = "cachegen-1, cachegen-3, cachegen-5"
# In words, MB/s at first, MB/s after DROP_S of a load.
LINKS = (
    ("200 MB/s", 200, 200),
    ("50 MB/s", 50, 50),
    ("dropping from 200 to 50 MB/s", 200, 50),
    ("dropping from 200 to 20 MB/s", 200, 20),
    ("dying, 1 MB/s", 200, 1),
)
# `kvstrata serve`, with the disk tier behind a link that may drop; a pause begins a new load.
THROTTLED = """
import time
import kvstrata.tiers.disk.tier as disk
from kvstrata.tiers.throttled import ThrottledTier

class Dropping(ThrottledTier):
    began = asked = 0.0

    def read(self, ids, into):
        now = time.monotonic()
        if now > self.asked + {pause} / 2:
            self.began = now
        self.asked = now
        self.set_rate(({first} if now < self.began + {drop} else {then}) * 1e6)
        outcomes = super().read(ids, into)
        self.asked = time.monotonic()
        return outcomes

inner = disk.DiskTier
disk.DiskTier = lambda path: Dropping(inner(path), {first}e6)
"""


@dataclass
class Measured:
    """Loads over one link: seconds, and what was read."""

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    levels: Counter[str] = field(default_factory=Counter)
    same: list[float] = field(default_factory=list)  # share of each answer's tokens

    @property
    def delays(self) -> list[float]:
        """What getting the KV cost, answer by answer."""
        return [warm - floor for warm, floor in zip(self.warm, self.floor, strict=True)]


def levels(asker: Asker) -> Counter[str]:
    """Objects read at each level so far."""
    counters = asker.ledger.client.status()["counters"]
    found = {re.search(r'streamed_objects_total{.*level="(.*?)"', name): name for name in counters}
    return Counter({m[1]: int(counters[name]) for m, name in found.items() if m})


def same(answer: Answer, exact: list[int]) -> float:
    """Share of an answer's tokens, up to the first other one, that the exact cache gives."""
    count = 0
    for mine, theirs in zip(answer.tokens, exact, strict=True):
        if mine != theirs:
            break
        count += 1
    return count / len(exact)


def measured(options: Options, prompts: Prompts, first: int, then: int, target: bool) -> Measured:
    """Ask about each document with only the disk tier holding it."""
    result = Measured()
    service = THROTTLED.format(first=first, then=then, drop=DROP_S, pause=PAUSE_S) + SERVE
    with disk_folder(options) as folder:
        settings = {
            "host.capacity": "1GiB",
            "planner": "off",
            "disk.path": str(folder),
            "disk.capacity": "4GiB",
            "disk.codec": "lossless",
            "disk.scrub_rate": 0,
            "deadlines.load": "60s",
            **({"disk.coarser": COARSER, "disk.load_target": f"{TARGET_S}s"} if target else {}),
        }
        with Workplace(prompts.model, settings, service) as place:
            asker = start(place, prompts, 1)
            for number in range(NUM_DOCUMENTS):
                result.cold.append(asker.cold(number).first_s)
            asker.ledger.drain()
            for _ in range(1 if options.quick else 4):
                for number in range(NUM_DOCUMENTS):
                    asker.ledger.client.clear(tiers=["host"])
                    asker.engine.reset_prefix_cache()
                    # The node may still bring up what vLLM had itself; and a load begins afresh.
                    time.sleep(PAUSE_S)
                    before = levels(asker)
                    answer = asker.engine.ask(asker.prompts[number])
                    (record,) = asker.ledger.next()
                    expect(record["slower_tokens"] == DOCUMENT_TOKENS, f"not from disk: {record}")
                    result.warm.append(answer.first_s)
                    result.levels += levels(asker) - before
                    result.same.append(same(answer, asker.answers[number]))
                    result.floor.append(asker.engine.ask(asker.prompts[number]).first_s)
                    asker.ledger.next()
    say(f"{'with' if target else 'without'} a target, from {first} to {then} MB/s:")
    say("  " + milliseconds("vLLM's own hit", result.floor))
    say("  " + milliseconds("from KVStrata", result.warm))
    return result


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    prompts = Prompts(options.seed, QUESTION)
    rows: list[Row] = []
    for link, first, then in LINKS:
        with_target = measured(options, prompts, first, then, target=True)
        if then == 1:
            baseline, words = spread(with_target.cold), "cold prefill"
        else:
            without = measured(options, prompts, first, then, target=False)
            expect(set(without.same) == {1.0}, "a lossless tier changed an answer")
            baseline, words = spread(without.warm), "without a target"
        here = spread(with_target.warm)
        read = ", ".join(f"{n} at {level}" for level, n in sorted(with_target.levels.items()))
        if then == first == 200:
            expect(set(with_target.levels) == {"0"}, f"read {read}")
            expect(set(with_target.same) == {1.0}, "an exact load changed an answer")
        exact = sum(with_target.same) / len(with_target.same)
        rows.append(
            Row(
                NAME,
                f"time to first token, {link}: {words} / with a target",
                baseline.median / here.median,
                None,
                detail=f"{words} {baseline.median * 1e3:.0f} ms, with {here.median * 1e3:.0f} ms; "
                f"objects read: {read}; {exact:.0%} of the answers' tokens; n = {here.count}",
            )
        )
        if then != 1:
            in_time = [delay <= TARGET_S for delay in with_target.delays]
            delays = spread(with_target.delays)
            rows.append(
                Row(
                    NAME,
                    f"loads within the target of {TARGET_S * 1e3:.0f} ms, {link}",
                    sum(in_time) / len(in_time),
                    0.9,
                    at_most=False,
                    detail=f"median {delays.median * 1e3:.0f} ms, longest "
                    f"{max(with_target.delays) * 1e3:.0f} ms",
                )
            )
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
