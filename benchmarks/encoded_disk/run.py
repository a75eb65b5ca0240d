"""What a codec below host memory gains: documents that fit, and time over links of several speeds.

The workload of `long_document_qa`, warm from disk, with the tier storing raw and lossless; on the
disk as it is, and behind a link of 500 and of 100 MB/s.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common import (
    CHUNK_TOKENS,
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
from benchmarks.long_document_qa.run import start, stored_files

from kvstrata.testing.workplace import SERVE, Workplace

NAME = "encoded_disk"
NUM_DOCUMENTS = 4
# Few tokens to compute, so that what is timed is the load and not the prefill of a question.
QUESTION = "\n\nSummary:"
LINKS = (0, 500, 100)  # MB/s; 0: as fast as the disk is
# `kvstrata serve`, with the disk tier behind a link.
THROTTLED = """
import kvstrata.tiers.disk.tier as disk
from kvstrata.tiers.throttled import ThrottledTier
inner = disk.DiskTier
disk.DiskTier = lambda path: ThrottledTier(inner(path), {rate}e6)
"""


@dataclass
class Measured:
    """One codec on one link: seconds of each answer, and bytes of a document in the tier."""

    warm: list[float]
    floor: list[float]
    nbytes: int

    @property
    def delays(self) -> list[float]:
        """What getting the KV cost, answer by answer."""
        return [warm - floor for warm, floor in zip(self.warm, self.floor, strict=True)]


def measured(options: Options, prompts: Prompts, codec: str, rate: int) -> Measured:
    """Ask about each document, again and again, with only the disk tier holding it."""
    result = Measured([], [], 0)
    service = THROTTLED.format(rate=rate) + SERVE if rate else True
    with disk_folder(options) as folder:
        settings = {
            "host.capacity": "1GiB",
            "planner": "off",
            "disk.path": str(folder),
            "disk.capacity": "4GiB",
            "disk.codec": codec,
        }
        with Workplace(prompts.model, settings, service) as place:
            asker = start(place, prompts, 1)
            before = stored_files(folder)
            for number in range(NUM_DOCUMENTS):
                asker.cold(number)
            asker.ledger.drain()
            files = stored_files(folder) - before
            expect(len(files) == NUM_DOCUMENTS * DOCUMENT_TOKENS // CHUNK_TOKENS, "files missing")
            result.nbytes = sum(path.stat().st_size for path in files) // NUM_DOCUMENTS
            for _ in range(2 if options.quick else 6):
                for number in range(NUM_DOCUMENTS):
                    asker.ledger.client.clear(tiers=["host"])
                    asker.engine.reset_prefix_cache()
                    result.warm.append(asker.loaded(number, "disk").first_s)
                    result.floor.append(asker.own(number).first_s)
    say(f"{codec}, {f'{rate} MB/s' if rate else 'the disk alone'}:")
    say("  " + milliseconds("vLLM's own hit", result.floor))
    say("  " + milliseconds("from KVStrata", result.warm))
    return result


def rows_of(link: str, raw: Measured, small: Measured, bound: float | None) -> list[Row]:
    """Two rows: the whole request, and what getting the KV cost."""

    def gain(
        what: str, of_raw: Sequence[float], of_small: Sequence[float], bound: float | None
    ) -> Row:
        there, here = spread(of_raw), spread(of_small)
        return Row(
            NAME,
            f"{what}, {link}: raw / lossless",
            there.median / here.median,
            bound,
            at_most=False,
            detail=f"raw {there.median * 1e3:.0f} ms, IQR {there.relative_iqr:.0%}; "
            f"lossless {here.median * 1e3:.0f} ms, IQR {here.relative_iqr:.0%}; n = {here.count}",
        )

    return [
        gain("time to first token", raw.warm, small.warm, bound),
        gain("delay of getting the KV", raw.delays, small.delays, None),
    ]


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    prompts = Prompts(options.seed, QUESTION)
    rows: list[Row] = []
    for rate in LINKS[:2] if options.quick else LINKS:
        raw = measured(options, prompts, "raw", rate)
        small = measured(options, prompts, "lossless", rate)
        if not rows:
            rows.append(
                Row(
                    NAME,
                    "documents that fit, lossless / raw",
                    raw.nbytes / small.nbytes,
                    1.45,
                    at_most=False,
                    detail=f"{raw.nbytes} and {small.nbytes} bytes a document",
                )
            )
        link = f"{rate} MB/s" if rate else "the disk alone"
        rows += rows_of(link, raw, small, 1.3 if rate else None)
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
