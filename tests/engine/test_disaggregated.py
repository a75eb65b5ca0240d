"""Prefill in one engine, decode in another: two real ones, with a node each, and proxies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.engine.engine import NEW_TOKENS
from tests.engine.plain import Plain, Texts
from tests.engine.servers import HOST, Program, Site, free_port

from kvstrata.connectors.naming import COMPUTE_FOR_ANOTHER
from kvstrata.testing.engine import engine_environment

pytestmark = pytest.mark.engine

LENGTHS = (40, 130, 500, 1500)
NEW = NEW_TOKENS


class Sides(NamedTuple):
    """Who computes, who decodes, and the proxy before them."""

    prefill: Site
    decode: Site
    proxy: Program

    def forget(self) -> None:
        self.prefill.forget()
        self.decode.forget()

    def check(self) -> None:
        self.prefill.check()
        self.decode.check()

    def loaded(self) -> int:
        """Tokens that the engine which decodes had from the other's node, in its last request."""
        record = self.decode.records()[-1]
        assert record["load"] in ("", "async")
        return int(record["loaded_tokens"])

    def handed_on(self, prompt: Sequence[int], **more: Any) -> list[int]:
        """What a proxy does that passes the parameters on as they are, one side after the other."""
        computed = self.prefill.server.ask(
            prompt, 1, kv_transfer_params=dict(COMPUTE_FOR_ANOTHER), **more
        )
        params = computed["kv_transfer_params"]
        return self.decode.server.tokens(prompt, NEW, kv_transfer_params=params, **more)


@pytest.fixture(scope="module")
def sides(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    folder = tmp_path_factory.mktemp("deployment")
    common = {"secret_file": str(folder / "secret")}
    cores = sorted(os.sched_getaffinity(0))
    listen = f"{HOST}:{free_port()}"
    with ExitStack() as ends:
        prefill = ends.enter_context(
            Site(tiny_llama, {**common, "network.listen": listen}, cores[0])
        )
        decode = ends.enter_context(
            Site(tiny_llama, {**common, "peer.named": listen, "peer.lookup_timeout": "1s"},
                 cores[-1])
        )  # fmt: skip
        port = free_port()
        command = ["-c", "from kvstrata.cli import main; main()", "proxy", f"--port={port}",
                   f"--prefill={prefill.server.url}", f"--decode={decode.server.url}"]  # fmt: skip
        proxy = Program(command, port, folder / "proxy.log", engine_environment({}))
        ends.callback(proxy.kill)
        for program in (prefill.server, decode.server, proxy):
            program.wait()
        yield Sides(prefill, decode, proxy)


def outcome(sides: Sides, name: str) -> int:
    """How many requests the proxy has counted as this."""
    import urllib.request

    with urllib.request.urlopen(f"{sides.proxy.url}/metrics") as response:
        for line in response.read().decode().splitlines():
            if line.startswith(f'kvstrata_proxy_requests_total{{outcome="{name}"}}'):
                return int(line.split()[-1])
    return 0


def test_the_same_tokens_as_one_engine_alone(sides: Sides, plain: Plain, texts: Texts) -> None:
    prompts = texts.of(*LENGTHS)
    right = [{*map(tuple, plain.cold([p])), *(tuple(a.tokens) for a in plain.both(p))}
             for p in prompts]  # fmt: skip
    for prompt, allowed in zip(prompts, right, strict=True):
        assert tuple(sides.handed_on(prompt)) in allowed
        assert sides.loaded() == len(prompt)
    for _ in range(2):
        sides.forget()
        for prompt, allowed in zip(prompts, right, strict=True):
            assert tuple(sides.proxy.tokens(prompt, NEW)) in allowed
            assert sides.loaded() == len(prompt)
    sides.check()
