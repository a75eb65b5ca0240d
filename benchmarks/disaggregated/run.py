"""Prompts computed in one engine and decoded in another; over one engine, over two whole ones."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from benchmarks.common import (
    Options,
    Prompts,
    Row,
    expect,
    main,
    milliseconds,
    say,
    spread,
)
from benchmarks.disaggregated.asking import Talker
from benchmarks.lmcache_client.servers import Server

from kvstrata.testing.engine import engine_environment
from kvstrata.testing.ports import HOST, free_port
from kvstrata.testing.serving import MODEL, Program, Streamed, on_core, stream
from kvstrata.testing.workplace import Workplace

NAME = "disaggregated"
NUM_BLOCKS = 96
NUM_TALKERS = 2
TALK_TOKENS, SHORT_TOKENS = 128, 64
STEP_TOKENS, CHECKED_TOKENS = 2048, 8
"""What a server computes of a prompt in one step, and tokens of an answer that are compared."""
REST_S = 0.5


class Setting(NamedTuple):
    """What is measured: the engines, and the two ways to use them."""

    model: str
    alone: Server
    decode: Workplace
    apart: Program
    whole: Program

    def computed(self) -> int:
        """Tokens of the last prompt that the engine which decodes computed itself."""
        client = self.decode.client()
        deadline = time.monotonic() + 10.0
        while not (records := client.status()["requests"]) and time.monotonic() < deadline:
            time.sleep(0.01)
        return int(records[-1]["prompt_tokens"] - records[-1]["loaded_tokens"])


@contextmanager
def setting(model: Path, folder: Path) -> Iterator[Setting]:
    """Two engines on a core each, a node each, and a proxy for each way."""
    cores = sorted(os.sched_getaffinity(0))
    listen = f"{HOST}:{free_port()}"
    common = {"host.capacity": "1GiB", "planner": "off", "secret_file": str(folder / "secret")}
    sides = ({"network.listen": listen}, {"peer.named": listen, "peer.lookup_timeout": "1s"})
    with ExitStack() as ends:
        servers, places = [], []
        for name, core, options in zip(
            ("prefill", "decode"), (cores[0], cores[-1]), sides, strict=True
        ):
            place = ends.enter_context(Workplace(model, {**common, **options}, service=True))
            with on_core(core):
                log = folder / f"{name}.log"
                server = Server(model, place.connector, place.environment, NUM_BLOCKS, log)
            ends.callback(server.kill)
            servers.append(server)
            places.append(place)
        prefill, decode = (server.url for server in servers)
        ways = (
            [f"--prefill={prefill}", f"--decode={decode}"],
            [f"--decode={prefill}", f"--decode={decode}"],
        )
        proxies = []
        for number, way in enumerate(ways):
            port = free_port()
            command = ["-m", "kvstrata.cli", "proxy", f"--port={port}", *way]
            log = folder / f"proxy-{number}.log"
            proxies.append(Program(command, port, log, engine_environment({})))
            ends.callback(proxies[-1].kill)
        for program in (*servers, *proxies):
            program.wait()
        yield Setting(MODEL, servers[0], places[1], *proxies)


def check_tokens(it: Setting, prompts: Prompts) -> None:
    """Both ways give the same tokens, where an engine alone splits the work as two do."""
    for prompt in prompts.make(2, collection=4):
        cut = prompt[: STEP_TOKENS + 1]
        alone, apart = (asked(way, it, cut, CHECKED_TOKENS) for way in (it.alone, it.apart))
        expect(it.computed() == 0, f"{it.computed()} tokens were not loaded")
        expect(apart.tokens == alone.tokens, f"{alone.tokens} alone, {apart.tokens} apart")


def first_tokens(it: Setting, prompts: Prompts, count: int) -> Row:
    """Time to first token, apart over alone."""
    ratios, apart_s, alone_s = [], [], []
    for number, prompt in enumerate(prompts.make(2 * count, collection=1)):
        other = prompts.make(2 * count, collection=2)[number]
        if number % 2:
            alone, apart = asked(it.alone, it, prompt), asked(it.apart, it, other)
        else:
            apart, alone = asked(it.apart, it, other), asked(it.alone, it, prompt)
        expect(it.computed() == 0, f"{it.computed()} tokens were not loaded")
        apart_s.append(apart.first_s)
        alone_s.append(alone.first_s)
        ratios.append(apart.first_s / alone.first_s)
    say("  " + milliseconds("first token, apart", apart_s))
    say("  " + milliseconds("first token, alone", alone_s))
    found = spread(ratios)
    return Row(
        NAME,
        "prompts of 3,000 tokens, prefill and decode apart / one engine alone (first token)",
        found.median,
        1.10,
        detail=f"{found}; {spread(apart_s).median * 1e3:.0f} ms and "
        f"{spread(alone_s).median * 1e3:.0f} ms, one core each",
    )


def asked(server: Program, it: Setting, prompt: list[int], max_tokens: int = 1) -> Streamed:
    return stream(server.url, it.model, prompt, max_tokens)


def gaps(it: Setting, prompts: Prompts, count: int, rounds: int) -> Row:
    """Between the tokens of answers, while prompts come in."""
    short = prompts.make(8, collection=3, tokens=SHORT_TOKENS)
    found: dict[str, list[float]] = {"apart": [], "whole": []}
    ratios = []
    for number in range(rounds):
        p99 = {}
        for place, (name, proxy) in enumerate((("apart", it.apart), ("whole", it.whole))):
            texts = prompts.make(count, collection=10 + 2 * number + place)
            talkers = [
                Talker(proxy.url, it.model, short[i::NUM_TALKERS], TALK_TOKENS)
                for i in range(NUM_TALKERS)
            ]
            time.sleep(REST_S)
            with ThreadPoolExecutor(NUM_TALKERS) as threads:
                for done in [threads.submit(asked, proxy, it, text) for text in texts]:
                    done.result()
            all_gaps = [g for talker in talkers for a in talker.stop() for g in a.gaps]
            found[name] += all_gaps
            p99[name] = float(np.percentile(all_gaps, 99))
        ratios.append(p99["apart"] / p99["whole"])
    for name, sample in found.items():
        say("  " + milliseconds(f"gaps, {name}", sample))
    milliseconds_p99 = " and ".join(
        f"{np.percentile(sample, 99) * 1e3:.0f} ms" for sample in found.values()
    )
    return Row(
        NAME,
        "prefill and decode apart / two whole engines (99th percentile of gaps between tokens)",
        spread(ratios).median,
        0.50,
        detail=f"{min(ratios):.3f} to {max(ratios):.3f} in {rounds} rounds; {milliseconds_p99}",
    )


def measure(options: Options) -> list[Row]:
    """The two rows of this benchmark."""
    prompts = Prompts(options.seed)
    folder = options.folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    with setting(prompts.model, folder.resolve()) as it:
        asked(it.apart, it, prompts.make(1)[0])  # says where the node is
        check_tokens(it, prompts)
        count = 1 if options.quick else 6
        return [
            first_tokens(it, prompts, count),
            gaps(it, prompts, 2 if options.quick else 8, 1 if options.quick else 3),
        ]


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
