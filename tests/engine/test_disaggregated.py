"""Prefill in one engine, decode in another: two real ones, with a node each, and proxies."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.engine.engine import NEW_TOKENS, Prompt
from tests.engine.place import eventually
from tests.engine.plain import Plain, Texts
from tests.engine.servers import HOST, MODEL, Program, Site, free_port

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
        records = self.decode.records()
        if not records:  # its engine has not found the new node yet
            return 0
        record = records[-1]
        print(record)  # what says why, if this is not enough
        assert record["load"] in ("", "async")
        return int(record["loaded_tokens"])

    def are_acquainted(self) -> bool:
        """Whether a request gets through, when it may have been the first one for anybody."""
        self.handed_on([1] * 20)
        self.forget()
        return self.loaded() == 20

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
        sides = Sides(prefill, decode, proxy)
        eventually(sides.are_acquainted, "what the one computed is loaded by the other")
        yield sides


def outcome(sides: Sides, name: str) -> int:
    """How many requests the proxy has counted as this."""
    with urllib.request.urlopen(f"{sides.proxy.url}/metrics") as response:
        for line in response.read().decode().splitlines():
            if line.startswith(f'kvstrata_proxy_requests_total{{outcome="{name}"}}'):
                return int(line.split()[-1])
    return 0


class Right:
    """What plain vLLM answers, cold or upon a hit of its own: one may round unlike the other."""

    def __init__(self, plain: Plain, texts: Texts) -> None:
        self._plain = plain
        self._texts = texts

    def of(self, *lengths: int) -> list[tuple[Prompt, set[tuple[int, ...]]]]:
        """New prompts, and what may be answered."""
        return [
            (prompt, {tuple(answer.tokens) for answer in self._plain.both(prompt)})
            for prompt in self._texts.of(*lengths)
        ]


@pytest.fixture
def right(plain: Plain, texts: Texts) -> Right:
    return Right(plain, texts)


def test_the_same_tokens_as_one_engine_alone(sides: Sides, right: Right) -> None:
    prompts = right.of(*LENGTHS)
    for prompt, allowed in prompts:
        assert tuple(sides.handed_on(prompt)) in allowed
        assert sides.loaded() == len(prompt), "all but the one token that has to be computed"
    for _ in range(2):
        sides.forget()
        for prompt, allowed in prompts:
            assert tuple(sides.proxy.tokens(prompt, NEW)) in allowed
            assert sides.loaded() == len(prompt)
    assert outcome(sides, "split") == 2 * len(prompts)
    sides.check()


def test_a_stream(sides: Sides, right: Right) -> None:
    ((prompt, allowed),) = right.of(700)
    body = {
        "model": MODEL, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    request = urllib.request.Request(
        f"{sides.proxy.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        lines = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    assert lines.pop() == b"[DONE]"
    events = [json.loads(line) for line in lines]
    choices = [choice for event in events for choice in event["choices"]]
    assert len(choices) > 1, "piece by piece"
    assert tuple(token for choice in choices for token in choice["token_ids"]) in allowed
    assert events[-1]["usage"]["prompt_tokens"] == len(prompt)


def test_many_at_once(sides: Sides, right: Right) -> None:
    prompts = right.of(*[100 + 150 * number for number in range(8)])
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(sides.proxy.tokens, prompt, 1) for prompt, _ in prompts]
        first = [future.result() for future in asked]
    assert all(
        tokens[0] in {answer[0] for answer in allowed}
        for tokens, (_, allowed) in zip(first, prompts, strict=True)
    )
    sides.check()


def test_each_of_them_dies_once(sides: Sides, right: Right) -> None:
    """Every answer is right, whoever is left; and all of it works again afterwards."""

    def ask(length: int, meanwhile: Callable[[], None] | None = None) -> None:
        ((prompt, allowed),) = right.of(length)
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(sides.proxy.tokens, prompt, NEW)
            if meanwhile is not None:
                meanwhile()
            assert tuple(asked.result()) in allowed

    def works_again() -> bool:
        sides.forget()
        ask(300)
        return sides.loaded() == 300

    ask(500)
    for site in (sides.prefill, sides.decode):
        ask(900, site.kill_node)
        ask(400)
        site.start_node()
        eventually(works_again, "both sides and their nodes")
    for site, other in ((sides.prefill, sides.decode), (sides.decode, sides.prefill)):
        before = outcome(sides, "whole")
        ask(1500, site.server.kill)
        ask(400)
        assert outcome(sides, "whole") > before
        other.check()
        site.server.start()
        site.server.wait()
        eventually(works_again, "both engines")
    sides.check()


def test_all_of_them_are_dead(sides: Sides) -> None:
    for site in (sides.prefill, sides.decode):
        site.server.kill()
    with pytest.raises(urllib.error.HTTPError) as failed:
        sides.proxy.ask([1, 2, 3], 4)
    with failed.value as answer:
        assert answer.code == 503
        assert answer.headers["Retry-After"] == "1"
