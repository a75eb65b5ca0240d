"""LMCache's own benchmark client, against KVStrata, vLLM's native offloading, and LMCache's daemon.

Each is behind an OpenAI server of the same vLLM, whose own KV cache is too small for the documents.
"""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import CHUNK_TOKENS, Options, Row, Wrong, expect, main, say
from benchmarks.intervals import percentile_ratio
from benchmarks.lmcache_client.overlay import NotInstalled, overlay, with_overlay
from benchmarks.lmcache_client.servers import (
    Server,
    daemon,
    lmcache,
    native,
)

from kvstrata.testing.engine import engine_environment
from kvstrata.testing.models import smollm2
from kvstrata.testing.ports import free_port
from kvstrata.testing.workplace import Workplace

NAME = "lmcache_client"
OURS, NATIVE, LMCACHE = "KVStrata", "vLLM's native offloading", "LMCache's daemon"
BOUNDS = {NATIVE: 0.95, LMCACHE: 0.80}
DOCUMENT_TOKENS = 3000
QUERIES = 3
MAX_TOKENS = 8
# vLLM's own cache has room for what is asked at once and a little more: documents that are asked
# for one after the other have left it when their turn comes again.
PROMPT_BLOCKS, SPARE_BLOCKS = 25, 16
# The least of its tokens that a request must have from behind vLLM.
LOADED = 0.9
PATIENCE_S = 600


def document(number: int) -> str:
    """A document of the client's, word for word."""
    return f"Document {number}: " + " ".join(["hi"] * (DOCUMENT_TOKENS - 10))


class Client:
    """LMCache's benchmark client, unchanged, as a program.

    Args:
        environment: that has LMCache.
        documents: how many.
    """

    def __init__(self, environment: dict[str, str], documents: int) -> None:
        self._environment = environment
        self._documents = documents

    def run(self, server: Server, in_flight: int, warm_up: bool = False) -> dict[str, float]:
        """Ask every document three questions, all documents in turn; seconds by request.

        Args:
            warm_up: begin with every document once, which is not counted.
        """
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {
                "engine-url": server.url,
                "workload": "long-doc-qa",
                # Its way to say how many documents.
                "kv-cache-volume": 1,
                "tokens-per-gb-kvcache": self._documents * DOCUMENT_TOKENS,
                "ldqa-document-length": DOCUMENT_TOKENS,
                "ldqa-query-per-document": QUERIES,
                "ldqa-num-inflight-requests": in_flight,
                "ldqa-max-output-length": MAX_TOKENS,
                "ldqa-shuffle-policy": "tile",
                "output-dir": folder,
            }
            flags = ["--ignore-eos", "--no-interactive", "--quiet"]
            command = ["-m", "lmcache.cli.main", "bench", "engine", *flags]
            command += [f"--{name}={value}" for name, value in options.items()]
            command += [] if warm_up else ["--no-warmup"]
            done = subprocess.run(
                [sys.executable, *command],
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
            if done.returncode:
                raise Wrong(f"LMCache's client failed: {done.stderr[-2000:]}")
            (path,) = Path(folder).glob("*.csv")
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        expect(len(rows) == self._documents * QUERIES, f"{len(rows)} requests were answered")
        failed = [row["error"] for row in rows if row["successful"] != "True"]
        expect(not failed, f"requests failed: {failed}")
        expect({int(row["num_output_tokens"]) for row in rows} == {MAX_TOKENS}, "short answers")
        return {row["request_id"]: float(row["ttft"]) for row in rows}


@contextmanager
def servers(
    model: Path, lmcache_folder: Path, gib: int, most_in_flight: int
) -> Iterator[dict[str, Server]]:
    """All three, ready, each with so much host memory."""
    environment = with_overlay(lmcache_folder, engine_environment({}))
    # Blocks are hashed alike in daemon and engine only with the same seed.
    environment |= {"PYTHONHASHSEED": "0", "LMCACHE_CHUNK_SIZE": str(CHUNK_TOKENS)}
    settings = {"host.capacity": f"{gib}GiB", "inside": "on"}  # as users have it
    place = Workplace(model, settings, service=True)
    with place, ExitStack() as stack:
        port = free_port()
        cache = daemon(environment, port, gib, place.folder / "daemon.log")
        stack.callback(cache.kill)
        cache.wait()  # without it vLLM's start hangs
        module = "benchmarks.lmcache_client.native_cpu"
        connectors = {
            OURS: (place.connector, place.environment),
            NATIVE: (native(module, gib), {}),
            LMCACHE: (lmcache(port), environment),
        }
        found = {}
        for number, (name, (connector, more)) in enumerate(connectors.items()):
            log = place.folder / f"server-{number}.log"
            num_blocks = PROMPT_BLOCKS * most_in_flight + SPARE_BLOCKS
            found[name] = Server(model, connector, more, num_blocks, log)
            stack.callback(found[name].kill)
        for server in found.values():
            server.wait()
        yield found


def compare_answers(found: dict[str, Server]) -> None:
    """Loaded and own answers must be equal, in all three: alone, all work is split alike."""
    texts = [f"{document(number)}\n\nSummarize the key points." for number in range(2)]
    answers = {}
    for name, server in found.items():
        for way in ("loaded", "own"):
            if way == "loaded":
                server.reset_prefix_cache()
            before = server.hits()
            answers[name, way] = [server.answer(text, MAX_TOKENS) for text in texts]
            own, behind = (now - then for now, then in zip(server.hits(), before, strict=True))
            least = LOADED * DOCUMENT_TOKENS * len(texts)
            expect((behind if way == "loaded" else own) >= least, f"{name}: not {way}")
    expect(len(set(map(tuple, answers.values()))) == 1, f"the answers differ: {answers}")


def measure(options: Options) -> list[Row]:
    """Two rows for each concurrency: beside vLLM's native offloading, and beside LMCache."""
    try:
        folder = overlay(options.folder)
    except NotInstalled as error:
        say(f"SKIPPED: LMCache cannot be installed here: {error}")
        return [Row(NAME, "SKIPPED: LMCache cannot be installed here", math.nan, None)]
    documents, turns, concurrency = (6, 1, (2,)) if options.quick else (21, 3, (2, 4, 8))
    client = Client(with_overlay(folder, engine_environment({})), documents)
    times: dict[tuple[str, int], list[dict[str, float]]] = {}
    loaded: dict[str, list[float]] = {}
    with servers(smollm2(), folder, 1 if options.quick else 2, max(concurrency)) as found:
        for name, server in found.items():
            client.run(server, 2, warm_up=True)
            say(f"{name}: every document is stored")
        compare_answers(found)
        for number in range(turns * len(concurrency)):
            in_flight = concurrency[number % len(concurrency)]
            names = list(found)
            first = number // len(concurrency) % len(names)
            for name in names[first:] + names[:first]:
                server = found[name]
                server.reset_prefix_cache()
                before = server.hits()
                asked = client.run(server, in_flight)
                own, behind = (now - then for now, then in zip(server.hits(), before, strict=True))
                share = behind / (DOCUMENT_TOKENS * len(asked))
                loaded.setdefault(name, []).append(share)
                times.setdefault((name, in_flight), []).append(asked)
                say(
                    f"{in_flight} in flight, {name}: "
                    f"{1e3 * np.median(list(asked.values())):.0f} ms; "
                    f"{share:.0%} of the tokens loaded, {own} tokens vLLM's own"
                )
                expect(name != OURS or share >= LOADED, "requests were not loaded from KVStrata")
    return [
        row_of(in_flight, other, times, loaded[other])
        for in_flight in concurrency
        for other in BOUNDS
    ]


def row_of(
    in_flight: int,
    other: str,
    times: dict[tuple[str, int], list[dict[str, float]]],
    loaded: list[float],
) -> Row:
    """The median of all turns over the other's."""
    ours, theirs = (
        [list(turn.values()) for turn in times[name, in_flight]] for name in (OURS, other)
    )
    found = percentile_ratio(ours, theirs, 50)
    p90 = percentile_ratio(ours, theirs, 90)
    by_turn = [np.median(a) / np.median(b) for a, b in zip(ours, theirs, strict=True)]
    ms = [1e3 * np.median(np.concatenate(each)) for each in (ours, theirs)]
    return Row(
        NAME,
        f"LMCache's client, {in_flight} in flight: KVStrata / {other}",
        found.value,
        BOUNDS[other],
        detail=f"turns {', '.join(f'{ratio:.3f}' for ratio in by_turn)}; p90 {p90.value:.3f}; "
        f"{ms[0]:.0f} and {ms[1]:.0f} ms, {len(ours[0])} requests a turn; "
        f"{min(loaded):.0%} of its tokens loaded at the least",
    )


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
