"""How close a hit from KVStrata comes to vLLM's own prefix hit: from host memory, and from disk.

Every comparison is made inside one engine, document after document, in pairs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import (
    CHUNK_TOKENS,
    DOCUMENT_TOKENS,
    Ledger,
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

from kvstrata.memory.pool import Pool
from kvstrata.objects import verify_object
from kvstrata.testing.engine import Answer, Engine
from kvstrata.testing.workplace import Workplace

NAME = "long_document_qa"
NUM_DOCUMENTS = 8
WANTED_IQR = 0.10
# A prompt is computed as the document, then the question. A hit leaves the question, so cold and
# warm split the work alike, and their answers must be equal to the bit.
ENGINE = {"max_num_batched_tokens": DOCUMENT_TOKENS}
# vLLM's block 0 holds nothing; a prompt takes 24 blocks of 128 tokens, two of them 48.
SMALL_POOL = {"num_gpu_blocks_override": 40, "max_model_len": 4096}


@dataclass
class Asked:
    """All the times of one variant, in seconds, and the pairs made of them by document."""

    cold: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    ratios: dict[int, list[float]] = field(default_factory=dict)
    differing_cold: int = 0

    def pair(self, document: int, warm_s: float, floor_s: float) -> None:
        """Enter one warm answer and the floor beside it."""
        self.warm.append(warm_s)
        self.ratios.setdefault(document, []).append(warm_s / floor_s)

    def iqr_of_documents(self) -> float:
        """Relative interquartile range of the documents' median ratios."""
        return spread(spread(each).median for each in self.ratios.values()).relative_iqr

    def tell(self, name: str) -> None:
        """Print the percentiles."""
        say(f"{name}:")
        for what, times in (("cold", self.cold), ("vLLM's own hit", self.floor)):
            if times:
                say("  " + milliseconds(what, times))
        say("  " + milliseconds("from KVStrata", self.warm))


class Asker:
    """Asks one engine, and proves of every answer what it was made of."""

    def __init__(self, engine: Engine, ledger: Ledger, prompts: Sequence[Any]) -> None:
        self.engine = engine
        self.ledger = ledger
        self.prompts = prompts
        self.answers: dict[int, list[int]] = {}

    def cold(self, number: int) -> Answer:
        """Computed; stored from then on."""
        stored = self.ledger.stored() + DOCUMENT_TOKENS // CHUNK_TOKENS
        answer = self.engine.ask(self.prompts[number])
        expect(answer.cached_tokens == 0, f"document {number} should be cold")
        self._check(number, answer)
        (record,) = self.ledger.next()
        expect(record["loaded_tokens"] == 0, "a cold answer was loaded from KVStrata")
        self.ledger.drain(stored)
        return answer

    def own(self, number: int) -> Answer:
        """The floor: vLLM has the document in its own prefix cache."""
        answer = self.engine.ask(self.prompts[number])
        self._check(number, answer)
        (record,) = self.ledger.next()
        expect(answer.cached_tokens == DOCUMENT_TOKENS, f"vLLM found {answer.cached_tokens}")
        expect(record["loaded_tokens"] == 0, "the floor was loaded from KVStrata")
        return answer

    def loaded(self, number: int, tier: str) -> Answer:
        """From KVStrata; vLLM must not have the document any more."""
        answer = self.engine.ask(self.prompts[number])
        self._check(number, answer)
        (record,) = self.ledger.next()
        here = record["host_tokens"] if tier == "host" else record["slower_tokens"]
        expect(
            answer.cached_tokens == record["loaded_tokens"] == here == DOCUMENT_TOKENS,
            f"vLLM counts {answer.cached_tokens} cached tokens, KVStrata {record}",
        )
        return answer

    def _check(self, number: int, answer: Answer) -> None:
        wanted = self.answers.setdefault(number, answer.tokens)
        expect(
            answer.tokens == wanted,
            f"document {number} was answered {answer.tokens}, and {wanted} before",
        )


def start(
    place: Workplace, prompts: Prompts, collection: int, more: Mapping[str, Any] | None = None
) -> Asker:
    """An engine that is warmed up, and the node's memory faulted in."""
    engine = place.engine(options={**ENGINE, **(more or {})})
    about = engine.wait()
    expect(about["block_tokens"] == CHUNK_TOKENS, f"blocks of {about['block_tokens']} tokens")
    ledger = Ledger(place.client())
    warm_up = Asker(engine, ledger, prompts.make(1, collection=collection))
    warm_up.cold(0)
    warm_up.own(0)
    engine.reset_prefix_cache()
    warm_up.loaded(0, "host")
    warm_up.own(0)
    return Asker(engine, ledger, prompts.make(NUM_DOCUMENTS))


def num_documents(options: Options) -> int:
    """How many documents are asked about."""
    return NUM_DOCUMENTS // 2 if options.quick else NUM_DOCUMENTS


def limits(options: Options) -> tuple[int, int, float]:
    """Fewest and most rounds, and the seconds after which no more are begun."""
    return (2, 3, 10.0) if options.quick else (8, 40, 35.0)


def from_host(options: Options, prompts: Prompts, variant: str) -> list[Row]:
    """Warm from host memory over the floor: ``on demand``, ``service`` or ``small pool``."""
    asked = Asked()
    small = variant == "small pool"
    with Workplace(prompts.model, {"host.capacity": "1GiB"}, variant == "service") as place:
        asker = start(place, prompts, 1, SMALL_POOL if small else {})
        for number in range(num_documents(options)):
            asked.cold.append(asker.cold(number).first_s)
        least, most, time_s = limits(options)
        began, rounds = time.monotonic(), 0
        while rounds < least or (
            rounds < most
            and time.monotonic() < began + time_s
            and asked.iqr_of_documents() >= WANTED_IQR / 2
        ):
            for number in range(num_documents(options)):
                if small:  # the other documents have pushed this one out
                    before = asker.loaded(number, "host").first_s
                    floor = asker.own(number).first_s
                    pairs = [before]
                else:
                    # Once before the floor and once after it, so that no drift takes sides.
                    asker.engine.reset_prefix_cache()
                    before = asker.loaded(number, "host").first_s
                    floor = asker.own(number).first_s
                    asker.engine.reset_prefix_cache()
                    pairs = [before, asker.loaded(number, "host").first_s]
                asked.floor.append(floor)
                for warm in pairs:
                    asked.pair(number, warm, floor)
            rounds += 1
    asked.tell(f"{variant}, {rounds} rounds of {num_documents(options)} documents")
    ratio = spread(r for each in asked.ratios.values() for r in each)
    iqr = asked.iqr_of_documents()
    return [
        Row(
            NAME,
            f"warm from host memory, {variant} / vLLM's own prefix hit",
            ratio.median,
            1.12,
            detail=f"{ratio}; IQR of the documents' medians {iqr:.1%}"
            + ("" if iqr < WANTED_IQR else f", more than {WANTED_IQR:.0%}: TOO NOISY")
            + f"; cold / warm {spread(asked.cold).median / spread(asked.warm).median:.1f}",
        )
    ]


class RawReader:
    """Reads files as fast as this disk gives them: O_DIRECT, several at once, into faulted memory.

    The memory is of the same kind as the pool's, in huge pages where it can be: a disk takes up to
    twice as long to fill pages that lie scattered.

    Args:
        num_threads: as many as the node's own.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads)
        list(self._threads.map(time.sleep, [0.01] * num_threads))
        self._buffer = Pool.create(4096)

    def seconds(self, files: Sequence[Path], verify: bool) -> float:
        """Time to read them all; ``verify`` their contents afterwards."""
        sizes = [path.stat().st_size for path in files]
        if self._buffer.capacity_bytes < sum(sizes):
            self._buffer.close()
            self._buffer = Pool.create(sum(sizes))
            self._buffer.populate(in_background=False)
        view = self._buffer.view(0, sum(sizes))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        into = [view[start : start + size] for start, size in zip(starts, sizes, strict=True)]

        def read(path: Path, buffer: memoryview) -> int:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                return os.preadv(fd, [buffer], 0)
            finally:
                os.close(fd)

        began = time.perf_counter()
        got = list(self._threads.map(read, files, into))
        ended = time.perf_counter()
        expect(got == sizes, "a raw read was short")
        if verify:
            for path, buffer in zip(files, into, strict=True):
                verify_object(buffer, bytes.fromhex(path.name.partition("-")[0]))
        return ended - began

    def close(self) -> None:
        """End its threads."""
        self._threads.shutdown()
        self._buffer.close()


def stored_files(folder: Path) -> set[Path]:
    """Every object of a disk tier."""
    return set(folder.glob("objects/*/*.kvo"))


def from_disk(options: Options, prompts: Prompts) -> list[Row]:
    """Warm from disk after a restart of engine and node, against raw reads of the same files."""
    asked = Asked()
    raw: list[float] = []
    shares: list[float] = []
    first: list[float] = []
    with disk_folder(options) as folder:
        settings = {"host.capacity": "1GiB", "disk.path": str(folder), "disk.capacity": "4GiB"}
        with Workplace(prompts.model, settings) as place:
            asker = start(place, prompts, 1)
            files: list[list[Path]] = []
            for number in range(num_documents(options)):
                before = stored_files(folder)
                asked.cold.append(asker.cold(number).first_s)
                files.append(sorted(stored_files(folder) - before))
                num_files = DOCUMENT_TOKENS // CHUNK_TOKENS
                expect(len(files[-1]) == num_files, f"{len(files[-1])} files, not {num_files}")
            place.end()
            say("engine and node have ended; both start again")
            answers = asker.answers
            asker = start(place, prompts, 2)
            asker.answers = answers
            asker.ledger.drain()
            disk = place.config.tier("disk")
            assert disk is not None
            reader = RawReader(disk.io_threads)
            least, most, time_s = limits(options)
            began, rounds = time.monotonic(), 0
            while rounds < least or (
                rounds < most
                and time.monotonic() < began + time_s
                and (rounds < 2 * least or asked.iqr_of_documents() >= WANTED_IQR / 2)
            ):
                for number in range(num_documents(options)):
                    if rounds:  # in the first round everything has just been restarted
                        asker.ledger.client.clear(tiers=["host"])
                        asker.engine.reset_prefix_cache()
                    raw_before = reader.seconds(files[number], verify=not rounds)
                    warm = asker.loaded(number, "disk").first_s
                    floor = asker.own(number).first_s
                    raw_after = reader.seconds(files[number], verify=False)
                    asked.floor.append(floor)
                    asked.pair(number, warm, floor)
                    raw += [raw_before, raw_after]
                    shares.append((warm - floor) / ((raw_before + raw_after) / 2))
                    if not rounds:
                        first.append(warm / floor)
                rounds += 1
            reader.close()
            nbytes = sum(path.stat().st_size for path in files[0])
    asked.tell(f"from disk, {rounds} rounds of {num_documents(options)} documents")
    say("  " + milliseconds("raw O_DIRECT read", raw))
    share, ratio = spread(shares), spread(r for each in asked.ratios.values() for r in each)
    speed = nbytes / spread(raw).median / 1e9
    return [
        Row(
            NAME,
            "(warm from disk - floor) / raw O_DIRECT read of the same files",
            share.median,
            1.2,
            detail=f"{share}; raw {speed:.2f} GB/s with {disk.io_threads} threads",
        ),
        Row(
            NAME,
            "warm from disk / vLLM's own prefix hit",
            ratio.median,
            None,
            detail=f"{ratio}; cold / warm "
            f"{spread(asked.cold).median / spread(asked.warm).median:.1f}",
        ),
        Row(
            NAME,
            "the same, first question after the restart of everything",
            spread(first).median,
            None,
            detail=str(spread(first)),
        ),
    ]


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark; in a hurry, of the variants that matter most."""
    prompts = Prompts(options.seed)
    rows: list[Row] = []
    for variant in ("on demand",) if options.quick else ("on demand", "service", "small pool"):
        rows += from_host(options, prompts, variant)
    return rows + from_disk(options, prompts)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
