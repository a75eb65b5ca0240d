"""Load or compute: the planner beside always loading and always computing, over many links.

Documents that only the disk tier holds, behind a link. At each speed every document is asked for in
three ways in turn, by one engine and one node; and by a plain vLLM that has no cache.
"""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import (
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
from benchmarks.long_document_qa.run import ENGINE, start

from kvstrata.testing.workplace import SERVE, Workplace

NAME = "planner"
NUM_DOCUMENTS = 4
SPEEDS = (10, 20, 35, 50, 70, 100, 200, 500, 0)  # MB/s; 0: as fast as the disk
QUICK = (10, 50, 500)
ALWAYS, NEVER, PLANNED, PLAIN = "always loading", "always computing", "planner", "no cache"
BOUND, SLOW_BOUND = 1.10, 1.03
PICTURE = Path("build/planner.png")

# `kvstrata serve` with the disk behind a link, whose speed, and the way to decide, lie in files.
SERVICE = """
from pathlib import Path
import kvstrata.node.matching as matching
import kvstrata.tiers.disk.tier as disk
from kvstrata.node.common.planner import Plan
from kvstrata.tiers.throttled import ThrottledTier

folder, decide, inner = Path({folder!r}), matching.plan, disk.DiskTier

def decided(tiers, nbytes, links, prefill, first=0):
    way = (folder / "way").read_text()
    if way == {always!r}:
        return Plan(len(tiers), 0.0, 0.0)
    if way == {never!r}:
        return Plan(0, 0.0, 0.0)
    return decide(tiers, nbytes, links, prefill, first)

class Linked(ThrottledTier):
    def read(self, ids, into):
        speed = float((folder / "speed").read_text())
        if not speed:
            return self.inner.read(ids, into)
        self.set_rate(1e6 * speed)
        return super().read(ids, into)

matching.plan = decided
disk.DiskTier = lambda path: Linked(inner(path), 1e9)
"""


@dataclass
class Measured:
    """Times to first token at one speed, by the way of deciding."""

    times: dict[str, list[float]] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)  # chunks that the planner loaded
    expected: list[float] = field(default_factory=list)  # what it reckoned / what it took

    def note(self, way: str, seconds: float) -> None:
        """One answer."""
        self.times.setdefault(way, []).append(seconds)

    def median(self, way: str) -> float:
        """Of its times."""
        return spread(self.times[way]).median


def sweep(options: Options, prompts: Prompts) -> dict[int, Measured]:
    """Every speed and every way."""
    speeds = QUICK if options.quick else SPEEDS
    found = {speed: Measured() for speed in speeds}
    with disk_folder(options) as folder:
        service = SERVICE.format(folder=str(folder), always=ALWAYS, never=NEVER) + SERVE
        settings = {
            "host.capacity": "1GiB",
            "disk.path": str(folder / "tier"),
            "disk.capacity": "4GiB",
            "disk.codec": "raw",
            "disk.scrub_rate": 0,
            "deadlines.load": "60s",
        }
        (folder / "speed").write_text("0")
        (folder / "way").write_text(PLANNED)
        with Workplace(prompts.model, settings, service) as place:
            asker = start(place, prompts, 1)
            plain = place.engine(with_kvstrata=False, options=dict(ENGINE))
            plain.wait()
            for number in range(NUM_DOCUMENTS):
                asker.cold(number)
                plain.ask(asker.prompts[number])
            asker.ledger.drain()
            for _ in range(1 if options.quick else 2):
                for speed, measured in found.items():
                    (folder / "speed").write_text(str(speed))
                    for number in range(NUM_DOCUMENTS):
                        for way in (ALWAYS, NEVER, PLANNED):
                            (folder / "way").write_text(way)
                            asker.ledger.client.clear(tiers=["host"])
                            asker.engine.reset_prefix_cache()
                            time.sleep(0.2)
                            answer = asker.engine.ask(asker.prompts[number])
                            (record,) = asker.ledger.next()
                            expect(
                                answer.tokens == asker.answers[number],
                                f"{way}, {speed} MB/s: another answer",
                            )
                            expect(record["found_chunks"] == DOCUMENT_TOKENS // CHUNK_TOKENS,
                                   f"not found: {record}")  # fmt: skip
                            measured.note(way, answer.first_s)
                            if way == PLANNED:
                                measured.kept.append(record["kept_chunks"])
                                reckoned = record["load_s_expected"] + record["rest_s_expected"]
                                took = record["load_s"] + record["computed_s"]
                                measured.expected.append(reckoned / took if took else 1.0)
                        plain.reset_prefix_cache()
                        measured.note(PLAIN, plain.ask(asker.prompts[number]).first_s)
                        # What was read to see whether the link is faster now must not disturb.
                        asker.ledger.drain()
    return found


def draw(found: dict[int, Measured]) -> None:
    """Time to first token over the link's speed."""
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        return
    figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    fastest = 2 * max(found)
    speeds = sorted(speed or fastest for speed in found)
    for way, style in ((ALWAYS, "o--"), (NEVER, "s--"), (PLAIN, "x:"), (PLANNED, "o-")):
        medians = [found[speed if speed in found else 0].median(way) * 1e3 for speed in speeds]
        axes.plot(speeds, medians, style, label=way, linewidth=2.5 if way == PLANNED else 1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("speed of the link, MB/s (the last: no bound but the disk's)")
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
    for speed, measured in found.items():
        name = f"{speed} MB/s" if speed else "no bound"
        medians = {way: measured.median(way) for way in measured.times}
        better = min((ALWAYS, NEVER), key=medians.__getitem__)
        ratio = spread(
            mine / theirs
            for mine, theirs in zip(measured.times[PLANNED], measured.times[better], strict=True)
        )
        words = ", ".join(f"{way} {seconds * 1e3:.0f} ms" for way, seconds in medians.items())
        reckoned = spread(measured.expected).median
        rows.append(
            Row(
                NAME,
                f"time to first token, link of {name}: planner / {better}",
                ratio.median,
                BOUND,
                detail=f"{ratio}; {words}; kept {sorted(set(measured.kept))} of "
                f"{DOCUMENT_TOKENS // CHUNK_TOKENS} chunks; reckoned / took {reckoned:.2f}",
            )
        )
    slowest = min(speed for speed in found if speed)
    slow = found[slowest]
    ratio = spread(
        mine / theirs for mine, theirs in zip(slow.times[PLANNED], slow.times[PLAIN], strict=True)
    )
    what = f"time to first token, link of {slowest} MB/s: planner / no cache"
    rows.append(Row(NAME, what, ratio.median, SLOW_BOUND, detail=str(ratio)))
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
