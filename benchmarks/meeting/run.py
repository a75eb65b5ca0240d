"""Load and compute at once, beside doing the one or the other, over many links.

Documents that only the disk tier holds, behind a link that is so many times as fast as the engine
computes. At each speed every document is asked for in three ways in turn, by one engine and one
node: all is loaded, nothing is, and both at once where the node plans that.
"""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import (
    BYTES_PER_TOKEN,
    CHUNK_TOKENS,
    DOCUMENT_TOKENS,
    Options,
    Prompts,
    Row,
    disk_folder,
    expect,
    main,
    say,
    spread,
)
from benchmarks.long_document_qa.run import Asker, start

from kvstrata.testing.workplace import SERVE, Workplace

NAME = "meeting"
NUM_DOCUMENTS, QUICK_DOCUMENTS = 4, 2
TIMES_AS_FAST = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
QUICK = (0.25, 1.0, 4.0)
LOADING, COMPUTING, BOTH = "loading", "computing", "both at once"
WAYS = (LOADING, COMPUTING, BOTH)
BOUND, ELSEWHERE = 1.6, 0.95
# Where the two meet is another cut each time: in float32 that rounds no token away.
EXACT, BYTES = {"dtype": "float32"}, 2 * BYTES_PER_TOKEN
PICTURE = Path("build/meeting.png")

# `kvstrata serve` with the disk behind a link, whose speed, and the way to decide, lie in files.
SERVICE = """
from pathlib import Path
import kvstrata.node.matching as matching
import kvstrata.tiers.disk.tier as disk
from kvstrata.node.common.planner import Plan
from kvstrata.tiers.throttled import ThrottledTier

folder, decide, meet, inner = Path({folder!r}), matching.plan, matching.meeting, disk.DiskTier

def decided(tiers, nbytes, links, prefill, first=0):
    way = (folder / "way").read_text()
    if way == {loading!r}:
        return Plan(len(tiers), 0.0, 0.0)
    if way == {computing!r}:
        return Plan(0, 0.0, 0.0)
    return decide(tiers, nbytes, links, prefill, first)

def met(*arguments):
    return meet(*arguments) if (folder / "way").read_text() == {both!r} else None

class Linked(ThrottledTier):
    def read(self, ids, into):
        self.set_rate(float((folder / "speed").read_text()))
        return super().read(ids, into)

matching.plan, matching.meeting = decided, met
disk.DiskTier = lambda path: Linked(inner(path), 1e9)
"""


@dataclass
class Measured:
    """Times to first token at one speed, by the way, and what the meetings were made of."""

    times: dict[str, list[float]] = field(default_factory=dict)
    met: list[int] = field(default_factory=list)  # chunks that were computed inside the load

    def median(self, way: str) -> float:
        """Of its times."""
        return spread(self.times[way]).median

    @property
    def better(self) -> str:
        """Of loading and computing."""
        return min((LOADING, COMPUTING), key=self.median)


def sweep(options: Options, prompts: Prompts) -> dict[float, Measured]:
    """Every speed and every way."""
    found = {times: Measured() for times in (QUICK if options.quick else TIMES_AS_FAST)}
    count = QUICK_DOCUMENTS if options.quick else NUM_DOCUMENTS
    with disk_folder(options) as folder:
        names = {"loading": LOADING, "computing": COMPUTING, "both": BOTH}
        settings = {
            "host.capacity": "1GiB",
            "disk.path": str(folder / "tier"),
            "disk.capacity": "4GiB",
            "disk.codec": "raw",
            "disk.scrub_rate": 0,
            "deadlines.load": "120s",
            "meet": "on",
            "planner": "on",
        }
        (folder / "speed").write_text("1e9")
        (folder / "way").write_text(LOADING)
        service = SERVICE.format(folder=str(folder), **names) + SERVE
        with Workplace(prompts.model, settings, service) as place:
            asker = start(place, prompts, 1, EXACT)
            computing = [asker.cold(number).first_s for number in range(count)]
            asker.ledger.drain()
            rate = DOCUMENT_TOKENS * BYTES / spread(computing).median
            for _ in range(1 if options.quick else 2):
                for times, measured in found.items():
                    (folder / "speed").write_text(str(times * rate))
                    for number in range(count):
                        for way in WAYS:
                            (folder / "way").write_text(way)
                            _ask(asker, number, way, measured)
                        # What was read to see whether the link is faster must not disturb.
                        asker.ledger.drain()
    return found


def _ask(asker: Asker, number: int, way: str, measured: Measured) -> None:
    """One answer, with the document on the disk alone."""
    asker.ledger.client.clear(tiers=["host"])
    asker.engine.reset_prefix_cache()
    time.sleep(0.2)
    answer = asker.engine.ask(asker.prompts[number])
    (record,) = asker.ledger.next()
    cold = asker.answers[number]
    expect(answer.tokens == cold, f"{way}: another answer")
    chunks = DOCUMENT_TOKENS // CHUNK_TOKENS
    expect(record["found_chunks"] == chunks, f"not found: {record}")
    expect(way == BOTH or not record["met_tokens"], f"{way} both at once: {record}")
    measured.times.setdefault(way, []).append(answer.first_s)
    if way == BOTH:
        measured.met.append(record["met_tokens"] // CHUNK_TOKENS)


def draw(found: dict[float, Measured]) -> None:
    """Time to first token over the link's speed."""
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        return
    figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for way, style in ((LOADING, "o--"), (COMPUTING, "s--"), (BOTH, "o-")):
        medians = [measured.median(way) * 1e3 for measured in found.values()]
        axes.plot(list(found), medians, style, label=way, linewidth=2.5 if way == BOTH else 1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("speed of the link, as a multiple of the engine's")
    axes.set_ylabel("time to first token, ms")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    say(f"the picture is {PICTURE}")


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    found = sweep(options, Prompts(options.seed))
    draw(found)
    rows = []
    for times, measured in found.items():
        gain = spread(
            theirs / mine
            for theirs, mine in zip(
                measured.times[measured.better], measured.times[BOTH], strict=True
            )
        )
        words = ", ".join(f"{way} {measured.median(way) * 1e3:.0f} ms" for way in WAYS)
        rows.append(
            Row(
                NAME,
                f"time to first token, link {times:g} times as fast as computing: "
                f"{measured.better} / {BOTH}",
                gain.median,
                BOUND if times == 1.0 else ELSEWHERE,
                at_most=False,
                detail=f"{gain}; {words}; computed inside the load {sorted(measured.met)} of "
                f"{DOCUMENT_TOKENS // CHUNK_TOKENS} chunks",
            )
        )
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
