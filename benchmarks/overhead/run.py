"""What metrics, records, canary and traces cost, all on over all off: node and engine, in turn."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
    DOCUMENT_TOKENS,
    Ledger,
    Options,
    Prompts,
    Row,
    expect,
    main,
    milliseconds,
    say,
    spread,
)
from benchmarks.node.asking import NAMESPACE, NUM_KEYS, ORDER, RAW, TEMPLATE, random_keys

from kvstrata.config import load_config
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.observe.counters import Counters
from kvstrata.observe.tracing import Tracer, around
from kvstrata.testing.workplace import Workplace, wait_ready
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect

NAME = "overhead"
BOUND = 1.03
FEW = 24
SCRAPE_S = 0.1
SAMPLE = 0.01
NOWHERE = "http://127.0.0.1:9/v1/traces"
"""Spans are made, batched and encoded, and then refused: the collector is not what is measured."""

ON = {"canary": "1s", "tracing.endpoint": NOWHERE, "tracing.sample": "1%"}
OFF = {"canary": "off"}

SERVE = """
import json, sys
from kvstrata.config import load_config
from kvstrata.node.node import Node
from kvstrata.node.process.run import run
from kvstrata.observe.counters import Counters

given = json.loads(sys.argv[1])
if given.pop("blind"):
    Counters.add = Counters.observe = lambda *arguments, **labels: None
    watch = Node.__init__
    def without(self, *arguments, **named):
        watch(self, *arguments, **named)
        self.changes._watchers = ()
    Node.__init__ = without
run(load_config(environ={}, overrides=given), on_ready=lambda: print("ready", flush=True))
"""


class Side:
    """One node in a process of its own, and the client that asks it.

    Args:
        folder: for its socket.
        sees: whether everything is on.
        others: further options.
    """

    def __init__(self, folder: Path, *, sees: bool) -> None:
        folder.mkdir()
        settings = {
            "node": f"unix:{folder}/node.sock", "secret_file": str(folder / "secret"),
            "host.capacity": "64MiB", "leases.per_client": "80%", **(ON if sees else OFF),
        }  # fmt: skip
        self.sees = sees
        given = json.dumps({**settings, "blind": not sees})
        command = [sys.executable, "-c", SERVE, given]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        expect(bool(self._process.stdout.readline()), "the node did not start")
        config = load_config(environ={}, overrides=settings)
        self.client: NodeClient = connect(config)
        wait_ready(self.client)
        self._scraper = connect(config)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._scrape, daemon=True)
        if sees:
            self._thread.start()
        self._tracer = Tracer("benchmark", SAMPLE) if sees else None
        self.num_stored = 0

    @property
    def cpu_s(self) -> float:
        """What the node's process has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def match(self, keys: list[bytes]) -> float:
        """Seconds of a match and its release."""
        begun = time.perf_counter()
        span = None
        if self._tracer is not None and (parent := self._tracer.begins(None)) is not None:
            span = self._tracer.start("request", parent)
        matched: p.Matched = self.client.match(
            keys, [0], [ORDER], [RAW], traceparent=span.traceparent if span else ""
        ).wait(30)
        self.client.release(matched.lease)
        taken = time.perf_counter() - begun
        expect(len(matched.tiers) == len(keys), "not all chunks were found")
        if span is not None:
            span.end()
        return taken

    def store(self, keys: list[bytes]) -> float:
        """Seconds of a store; what is there is cleared before."""
        self.client.clear(keys)
        begun = time.perf_counter()
        reserved: p.Reserved = self.client.reserve(NAMESPACE, keys, 0, 0, TEMPLATE).wait(30)
        sums = []
        for key, offset in zip(keys, offsets_of(reserved.offsets), strict=True):
            data = key * (RAW // 32)
            self.client.pool.view(offset + HEADER_BYTES, RAW)[:] = data
            sums.append(checksum(data))
        done: p.Done = self.client.commit(reserved.reservation, sums).wait(30)
        taken = time.perf_counter() - begun
        expect(done.count == len(keys), "not all chunks were published")
        self.num_stored += len(keys)
        return taken

    def record(self) -> None:
        """Hand in a request's record, as an engine does at its end."""
        if self.sees:
            self.client.record({
                "request": "benchmark", "outcome": "stopped", "prompt_tokens": 3000,
                "local_tokens": 0, "loaded_tokens": 2944, "tier_tokens": {"host": 2944},
                "load": "sync", "load_s": 0.01, "load_s_expected": 0.0, "load_instead_s": 0.9,
            })  # fmt: skip

    def close(self) -> None:
        """End the node; it has counted what it did, or nothing."""
        counted = self.client.status()["counters"].get("stored_objects_total", 0)
        expect(counted == (self.num_stored if self.sees else 0), f"{counted} stores counted")
        self._ended.set()
        if self.sees:
            self._thread.join()
        self._scraper.close()
        self.client.close()
        self._process.terminate()
        self._process.wait()

    def _scrape(self) -> None:
        while not self._ended.wait(SCRAPE_S):
            self._scraper.metrics()


def on_nodes(options: Options) -> list[Row]:
    """The node's own verbs."""
    turns, each = (20, 10) if options.quick else (200, 20)
    many, few = random_keys(NUM_KEYS, options.seed), random_keys(FEW, options.seed + 1)
    with tempfile.TemporaryDirectory(prefix="kv-") as folder, contextlib.ExitStack() as ends:
        sides = {
            name: Side(Path(folder) / name, sees=name == "on") for name in ("on", "off")
        }  # fmt: skip
        for side in sides.values():
            ends.callback(side.close)
            side.store(many)
        verbs: dict[str, Callable[[Side], float]] = {
            f"match of {NUM_KEYS} chunks": lambda side: side.match(many),
            f"match of {FEW} chunks": lambda side: side.match(few),
            f"store of {FEW} chunks": lambda side: side.store(few),
        }
        rows = []
        for side in sides.values():
            side.store(few)
        for what, verb in verbs.items():
            ratios, taken = [], dict[str, list[float]](on=[], off=[])
            for turn in range(turns):
                best = {}
                for name in ("on", "off") if turn % 2 else ("off", "on"):
                    times = [verb(sides[name]) for _ in range(each)]
                    taken[name] += times
                    best[name] = sorted(times)[len(times) // 2]
                ratios.append(best["on"] / best["off"])
            for name, times in taken.items():
                say("  " + milliseconds(f"{what}, {name}", times))
            found = spread(ratios, options.seed)
            more = (sorted(taken["on"])[len(taken["on"]) // 2]
                    - sorted(taken["off"])[len(taken["off"]) // 2]) * 1e6  # fmt: skip
            detail = f"{more:.0f} µs more; {found}"
            rows.append(Row(NAME, f"{what}, on / off", found.median, None, detail=detail))
        rows.append(cpu_of_a_request(sides, few, 1000 if options.quick else 20_000))
    return rows


def cpu_of_a_request(sides: dict[str, Side], keys: list[bytes], count: int) -> Row:
    """What a request costs more in the node's process, in µs."""
    used = {name: 0.0 for name in sides}
    blocks = 20
    for block in range(blocks):
        for name in ("on", "off") if block % 2 else ("off", "on"):
            side, before = sides[name], sides[name].cpu_s
            for _ in range(count // blocks):
                side.match(keys)
                side.record()
            side.client.status()  # which is answered after all that was sent
            used[name] += side.cpu_s - before
    more = (used["on"] - used["off"]) / count * 1e6
    return Row(
        NAME,
        f"CPU of the node for a request (match of {len(keys)} chunks, record), on - off",
        more, None, unit="µs",
        detail=f"on {used['on'] / count * 1e6:.0f} µs, off {used['off'] / count * 1e6:.0f} µs, "
        f"n = {count}, with 10 scrapes and a canary a second",
    )  # fmt: skip


def nanoseconds() -> list[Row]:
    """What is done for every request, sampled or not."""
    counters, tracer, count = Counters(), Tracer("benchmark", 1e-9), 200_000

    def nothing() -> None:
        return None

    works: dict[str, Callable[[], object]] = {
        "a counter with two labels": partial(
            counters.add, "tier_reads_total", tier="disk", outcome="hit"
        ),
        "a histogram": partial(counters.observe, "match_seconds", 0.0013),
        "deciding that a request is not traced": partial(tracer.begins, None),
        "a match past the tracer": partial(around, tracer, "x", "", nothing),
    }
    rows = []
    for what, work in works.items():
        best = min(_timed(work, count) - _timed(nothing, count) for _ in range(5))
        rows.append(Row(NAME, what, best / count * 1e9, None, unit="ns", detail="best of 5"))
    return rows


def _timed(work: Callable[[], object], count: int) -> float:
    begun = time.perf_counter()
    for _ in range(count):
        work()
    return time.perf_counter() - begun


@contextlib.contextmanager
def scraping(client: NodeClient) -> Iterator[None]:
    """Scrape a node meanwhile."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(SCRAPE_S):
            client.metrics()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def on_engines(options: Options) -> list[Row]:
    """Long documents out of host memory, by engines that take turns: on, off, and off once more."""
    from kvstrata.testing.models import smollm2, tiny_llama

    model = tiny_llama() if options.quick else smollm2()
    documents, rounds = (2, 2) if options.quick else (8, 6)
    names = ("on", "off", "control")
    with contextlib.ExitStack() as ends:
        places = {
            name: ends.enter_context(
                Workplace(model, {"host.capacity": "2GiB", "planner": "off",
                                  **(ON if name == "on" else OFF)})
            )
            for name in names
        }  # fmt: skip
        engines = {name: place.engine() for name, place in places.items()}
        for engine in engines.values():
            engine.wait()
        ledgers = {name: Ledger(place.client()) for name, place in places.items()}
        ends.enter_context(scraping(places["on"].client()))
        prompts = Prompts(options.seed).make(documents)
        if options.quick:  # the tiny model knows few tokens
            prompts = [[token % 1000 for token in prompt] for prompt in prompts]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            for prompt in prompts:
                engines[name].ask(prompt)
            ledgers[name].next(len(prompts))
            ledgers[name].drain(len(prompts) * (DOCUMENT_TOKENS // 128))
        for number in range(rounds):
            for prompt in prompts:
                order = names[number % 3 :] + names[: number % 3]
                tokens = set()
                for name in order:
                    engines[name].reset_prefix_cache()
                    answer = engines[name].ask(prompt)
                    (record,) = ledgers[name].next()
                    expect(record["loaded_tokens"] >= DOCUMENT_TOKENS - 1, "it was not loaded")
                    seconds[name].append(answer.first_s)
                    tokens.add(tuple(answer.tokens))
                expect(len(tokens) == 1, "the answers differ")
    for name in names:
        say("  " + milliseconds(f"warm, {name}", seconds[name]))

    def row(what: str, mine: str, bound: float | None) -> Row:
        pairs = zip(seconds[mine], seconds["off"], strict=True)
        found = spread([one / other for one, other in pairs], options.seed)
        return Row(NAME, what, found.median, bound, detail=str(found))

    return [
        row("warm time to first token, on / off, in turn", "on", BOUND),
        row("control: the same, off / off", "control", None),
    ]


def measure(options: Options) -> list[Row]:
    """All rows."""
    rows: list[Any] = [*nanoseconds(), *on_nodes(options), *on_engines(options)]
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
