"""Two real engines with a node each behind proxies: prefill and decode apart, or whole requests."""

from __future__ import annotations

import itertools
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.engine.engine import NEW_TOKENS, Prompt
from tests.engine.place import eventually
from tests.engine.plain import Plain, Texts
from tests.engine.servers import Program, Site, events
from tests.engine.shared import Engines

from kvstrata.cli.counting import total
from kvstrata.connectors.naming import COMPUTE_FOR_ANOTHER
from kvstrata.observe.catalogue import ENGINE_PREFIX
from kvstrata.testing.engine import engine_environment
from kvstrata.testing.ports import HOST, free_port

pytestmark = pytest.mark.engine

LENGTHS = (40, 130, 500, 1500)
NEW = NEW_TOKENS
Allowed = set[tuple[int, ...]]


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


def start_proxy(ends: ExitStack, log: Path, *options: str) -> Program:
    """A proxy with these options."""
    port = free_port()
    command = ["-m", "kvstrata.cli", "proxy", f"--port={port}", *options]
    proxy = Program(command, port, log, engine_environment({}))
    ends.callback(proxy.kill)
    return proxy


@pytest.fixture(scope="module")
def sides(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    folder = tmp_path_factory.mktemp("deployment")
    common = {"secret_file": str(folder / "secret")}
    listen = f"{HOST}:{free_port()}"
    with ExitStack() as ends:
        prefill = ends.enter_context(Site(tiny_llama, {**common, "network.listen": listen}))
        decode = ends.enter_context(
            Site(tiny_llama, {**common, "peer.named": listen, "peer.lookup_timeout": "1s"})
        )  # fmt: skip
        options = [f"--prefill={prefill.server.url}", f"--decode={decode.server.url}"]
        proxy = start_proxy(ends, folder / "proxy.log", *options)
        for program in (prefill.server, decode.server, proxy):
            program.wait()
        sides = Sides(prefill, decode, proxy)
        eventually(sides.are_acquainted, "what the one computed is loaded by the other")
        yield sides
        for site in (prefill, decode):
            site.server.kill()
            site.stop_node()


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

    def of(self, *lengths: int) -> list[tuple[Prompt, Allowed]]:
        """New prompts, and what may be answered."""
        return [
            (prompt, {tuple(answer.tokens) for answer in self._plain.both(prompt)})
            for prompt in self._texts.of(*lengths)
        ]


@pytest.fixture
def right(engines: Engines, tiny_llama: Path, texts: Texts) -> Right:
    return Right(engines.plain(tiny_llama, dtype="float32"), texts)


def test_the_same_tokens_as_one_engine_alone(sides: Sides, right: Right) -> None:
    prompts, count = right.of(*LENGTHS), 0

    def loads(ask: Callable[[Prompt], list[int]], prompt: Prompt, allowed: Allowed) -> int:
        """Have all but the one token loaded that has to be computed; in how many tries."""
        tries = 0

        def loaded() -> bool:
            nonlocal tries
            if tries:  # the machine stood still for as long as a peer is waited for
                sides.forget()
            tries += 1
            assert tuple(ask(prompt)) in allowed
            return sides.loaded() == len(prompt)

        eventually(loaded, f"{len(prompt)} tokens are loaded")
        return tries

    for prompt, allowed in prompts:
        loads(sides.handed_on, prompt, allowed)
    for _ in range(2):
        sides.forget()
        for prompt, allowed in prompts:
            count += loads(lambda prompt: sides.proxy.tokens(prompt, NEW), prompt, allowed)
    assert outcome(sides, "split") == count
    sides.check()


def test_vllms_own_metrics_have_the_connectors(sides: Sides) -> None:
    before, prompt = scraped(sides.decode.server), [7, 3] * 300
    assert sides.handed_on(prompt)
    length = sides.loaded()
    after = scraped(sides.decode.server)
    assert after["asked_tokens_total"] - before["asked_tokens_total"] == length
    loaded = sum(after[name] - before.get(name, 0) for name in after if "hit_tokens" in name)
    assert loaded == length
    assert any(name.startswith("load_seconds_count load=async") for name in after)
    assert scraped(sides.prefill.server)["asked_tokens_total"] > 0
    # A store is heard of in the step after it, which there may not be before the next request.
    sides.prefill.server.tokens([5] * 40, 2)
    sides.prefill.server.tokens([6] * 40, 2)
    assert scraped(sides.prefill.server)["stored_bytes_total"] > 0


def scraped(server: Program) -> dict[str, float]:
    """The connector's metrics in an engine's own, without vLLM's labels."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {
        sample.name.removeprefix(ENGINE_PREFIX)
        + "".join(
            f" {label}={value}"
            for label, value in sorted(sample.labels.items())
            if label not in ("engine", "model_name")
        ): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith(ENGINE_PREFIX)
    }


def test_a_stream(sides: Sides, right: Right) -> None:
    ((prompt, allowed),) = right.of(700)
    pieces, done = events(sides.proxy, prompt, NEW)
    assert done
    choices = [choice for piece in pieces for choice in piece["choices"]]
    assert len(pieces) > 1  # how many of them have tokens, vLLM decides by how busy it is
    assert tuple(token for choice in choices for token in choice["token_ids"]) in allowed
    assert pieces[-1]["usage"]["prompt_tokens"] == len(prompt)


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


def test_routed_each_answers_whole_and_what_was_asked_before_goes_where_it_was(
    sides: Sides, right: Right, tmp_path: Path
) -> None:
    """The same tokens as one engine alone; both have work, and the longest has hits."""

    def counts() -> list[float]:
        sites = (sides.prefill, sides.decode)
        return [total(site.node.status()["counters"], "requests_total") for site in sites]

    def asked(prompts: Sequence[Prompt]) -> list[float]:
        """How many more each engine's node heard of."""
        before = counts()
        for prompt in prompts:
            assert tuple(routed.tokens(prompt, NEW)) in allowed[tuple(prompt)]
        eventually(lambda: sum(counts()) == sum(before) + len(prompts), "all are recorded")
        return [after - first for after, first in zip(counts(), before, strict=True)]

    allowed = {tuple(prompt): answers for prompt, answers in right.of(*LENGTHS)}
    prompts = [list(prompt) for prompt in allowed]
    sides.forget()
    with ExitStack() as ends:
        options = [f"--engine={site.server.url}" for site in (sides.prefill, sides.decode)]
        routed = start_proxy(ends, tmp_path / "routed.log", *options)
        routed.wait()
        assert min(asked(prompts)) >= 1
        assert sorted(asked(prompts[-1:] * 3)) == [0, 3]
        pieces, done = events(routed, prompts[-1], NEW)
    assert done
    choices = [choice for piece in pieces for choice in piece["choices"]]
    tokens = tuple(token for choice in choices for token in choice["token_ids"])
    assert tokens in allowed[tuple(prompts[-1])]
    sides.check()


class Clients:
    """Three who ask the proxy again and again, and wait where it says so; each answer is judged.

    Args:
        prompts: with what may be answered.
    """

    def __init__(
        self, proxy: Program, prompts: Sequence[tuple[Prompt, set[tuple[int, ...]]]], seed: int
    ) -> None:
        self._proxy = proxy
        self._prompts = prompts
        self._enough = threading.Event()
        self._counting = threading.Lock()
        self.counts: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(3)
        self._running = [self._threads.submit(self._ask_on, 3 * seed + i) for i in range(3)]

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *exception: object) -> None:
        self._enough.set()
        self._threads.shutdown()

    def end(self) -> None:
        """Ask no more; none of them was answered wrongly, or in another way than is promised."""
        self._enough.set()
        for running in self._running:
            running.result()

    def until(self, true: Callable[[], bool], what: str) -> None:
        """As `eventually`, while they go on."""

        def going() -> bool:
            for running in self._running:
                if running.done():
                    running.result()
            return true()

        eventually(going, what)

    def answer(self, count: int) -> None:
        """Return when so many more are answered."""
        enough = self.counts["answered"] + count
        self.until(lambda: self.counts["answered"] >= enough, f"{count} answers more")

    def _ask_on(self, seed: int) -> None:
        draw = random.Random(seed)
        for number in itertools.count():
            prompt, allowed = draw.choice(self._prompts)
            # Mostly one of its own, and then neither side has anything of it.
            salt = f"{seed} {number}" if draw.random() < 0.7 else "everybody's"
            ask = self._stream if draw.random() < 0.4 else self._whole
            while not ask(prompt, allowed, salt):
                time.sleep(1.0)
            self._count("answered")
            if self._enough.wait(draw.uniform(0.0, 0.3)):  # who starts needs the cores, too
                return

    def _whole(self, prompt: Prompt, allowed: set[tuple[int, ...]], salt: str) -> bool:
        try:
            tokens = self._proxy.tokens(prompt, NEW, cache_salt=salt)
        except urllib.error.HTTPError as failed:
            return self._try_again(failed)
        assert tuple(tokens) in allowed
        return True

    def _stream(self, prompt: Prompt, allowed: set[tuple[int, ...]], salt: str) -> bool:
        try:
            pieces, done = events(self._proxy, prompt, NEW, cache_salt=salt)
        except urllib.error.HTTPError as failed:
            return self._try_again(failed)
        if not done:
            assert pieces.pop()["error"]["code"] == 503
            self._count("broken off")
        choices = [choice for piece in pieces for choice in piece["choices"]]
        tokens = tuple(token for choice in choices for token in choice["token_ids"])
        assert tokens in {answer if done else answer[: len(tokens)] for answer in allowed}
        return done

    def _try_again(self, failed: urllib.error.HTTPError) -> bool:
        with failed:
            assert (failed.code, failed.headers["Retry-After"]) == (503, "1")
        self._count("refused")
        return False

    def _count(self, what: str) -> None:
        with self._counting:
            self.counts[what] += 1


@pytest.mark.dear
def test_200_requests_while_engines_and_nodes_die(sides: Sides, right: Right) -> None:
    """At moments of chance; whoever is left answers, and afterwards all of it works again."""
    draw = random.Random(11)
    prompts = right.of(*[30 + 73 * number for number in range(16)])
    ((last, allowed),) = right.of(300)

    def works_again() -> bool:
        sides.forget()
        assert tuple(sides.proxy.tokens(last, NEW)) in allowed
        return sides.loaded() == len(last)

    def kill_engine(site: Site) -> None:
        time.sleep(draw.uniform(0.0, 0.5))
        before = outcome(sides, "whole")
        site.server.kill()
        clients.until(lambda: outcome(sides, "whole") > before, "the other side does all of it")

    def kill_node(site: Site) -> None:
        time.sleep(draw.uniform(0.0, 0.5))
        site.kill_node()
        clients.answer(draw.randint(1, 8))
        site.start_node()
        clients.answer(draw.randint(1, 8))

    with Clients(sides.proxy, prompts, 0) as clients:
        for site in draw.sample([sides.prefill, sides.decode] * 2, 4):
            kill_node(site)
        kill_engine(sides.prefill)
        kill_node(sides.decode)
        sides.decode.server.kill()
        clients.until(lambda: clients.counts["refused"] > 0, "nobody is left")
        for site in (sides.prefill, sides.decode):
            site.server.start()
        for site in (sides.prefill, sides.decode):
            site.server.wait()
        clients.answer(3)
        clients.end()
    eventually(works_again, "both sides and their nodes")
    answered = clients.counts["answered"]
    with Clients(sides.proxy, prompts, 1) as clients:
        clients.answer(10)
        kill_engine(sides.decode)
        kill_node(sides.prefill)
        clients.answer(max(20, 200 - answered))
        clients.end()
    sides.check()


def test_all_of_them_are_dead(sides: Sides) -> None:
    """The last one: nobody starts them again."""
    for site in (sides.prefill, sides.decode):
        site.server.kill()
    with pytest.raises(urllib.error.HTTPError) as failed:
        sides.proxy.ask([1, 2, 3], 4)
    with failed.value as answer:
        assert answer.code == 503
        assert answer.headers["Retry-After"] == "1"
