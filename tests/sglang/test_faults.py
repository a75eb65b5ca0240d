"""The cache never takes SGLang down: dead, stopped and missing nodes, failures that SGLang injects.

The model computes in float32, so that a batch that is cut otherwise rounds no token away: every
answer, however it came about, must be the one that SGLang computes where there is no node.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.engine.plain import Texts
from tests.sglang.children import Answer, Server
from tests.sglang.place import ADMIN, PATIENCE_S, Place, eventually, pages

from kvstrata.errors import KVStrataError
from kvstrata.testing import models

FLOAT32: Mapping[str, object] = {"dtype": "float32"}
LENGTHS = (300, 700, 1100, 900, 500, 140)
REQUEST_S = 0.5
# A busy disk may take a second for what is cleared; that is no fault.
SETTINGS = {"deadlines.load": "5s", "deadlines.request": "500ms"}
SGLANG_S = 1.0
"""SGLang's own patience with a prefetch."""
SLACK_S = 15.0
"""On a machine that others use too; what is stuck is so for longer."""


class World:
    """Prompts, what SGLang computes, and threads that ask while something is done to a node.

    Args:
        prompts: to be asked about.
        answers: right ones.
    """

    def __init__(self, prompts: list[list[int]], answers: list[Answer]) -> None:
        self.prompts = prompts
        self._answers = dict(zip(map(tuple, prompts), answers, strict=True))
        self._threads = ThreadPoolExecutor(4)
        self.slowest_s = 0.0

    def ask(self, server: Server, prompt: list[int]) -> Answer:
        """Ask, and compare."""
        began, right = time.monotonic(), self._answers[tuple(prompt)]
        answer = server.ask(prompt)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        assert answer.tokens == right.tokens
        assert answer.logprobs == pytest.approx(right.logprobs, abs=1e-3)
        return answer

    def begin(self, server: Server, rounds: int = 1) -> list[Future[Answer]]:
        """Ask about all prompts, four at a time, over and over."""
        return [
            self._threads.submit(self.ask, server, prompt)
            for _ in range(rounds)
            for prompt in self.prompts
        ]

    def hits(self, server: Server) -> int:
        """Tokens that come from the node for these prompts now."""
        server.flush()
        return sum(one.result().loaded for one in self.begin(server))

    def await_all(self, server: Server) -> None:
        """Every whole page hits, by itself: the first ask stores what a later one finds."""
        whole = sum(pages(len(prompt)) for prompt in self.prompts)
        eventually(lambda: self.hits(server) == whole, "it all hits")


@pytest.fixture(scope="module")
def place(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A node, and an SGLang that started without one and still is."""
    disk = {"disk.path": str(tmp_path_factory.mktemp("disk")), "disk.capacity": "1GiB"}
    with Place(tiny_llama, {**SETTINGS, **disk}) as place:
        place.kill_node()
        place.server(FLOAT32).wait()
        yield place


@pytest.fixture(scope="module")
def world(place: Place, tokenizer: models.Tokenizer) -> World:
    prompts = Texts(tokenizer, "faults").of(*LENGTHS)
    answers = [place.servers[0].ask(prompt) for prompt in prompts]
    assert not any(answer.cached for answer in answers), "nothing but SGLang was in it"
    place.start_node()
    return World(prompts, answers)


def await_node(place: Place) -> None:
    def there() -> bool:
        with contextlib.suppress(KVStrataError):
            place.node.status()
            return True
        return False

    eventually(there, "a node")


@pytest.fixture
def server(place: Place, world: World) -> Iterator[Server]:
    """The place's SGLang, whose every scenario ends well."""
    server = place.servers[0]
    await_node(place)
    world.slowest_s = 0.0
    yield server
    assert "Traceback" not in server.said
    assert not server.ended()
    place.check()


def test_no_node_at_the_start_is_a_miss_until_it_comes(server: Server, world: World) -> None:
    assert "has no node, the engine computes everything" in server.log
    world.await_all(server)


def storing(place: Place) -> bool:
    return bool(place.node.status()["leases"]["reservations"])


def loading(place: Place) -> bool:
    return bool(place.node.status()["leases"]["count"])


def at_once(place: Place) -> bool:
    return True


def some_stored(place: Place) -> bool:
    return bool(place.node.status()["counters"].get("stored_objects_total", 0) > 3)


POINTS: Sequence[tuple[str, bool, Callable[[Place], bool]]] = (
    ("between two requests", False, at_once),
    ("while it stores", False, storing),
    ("when some is stored", False, some_stored),
    ("while it is read", True, loading),
    ("as an engine attaches", True, at_once),
)


@pytest.mark.parametrize(("point", "full", "reached"), POINTS, ids=[name for name, *_ in POINTS])
def test_a_node_is_killed_under_load(
    place: Place, server: Server, world: World, point: str, full: bool, reached: Any
) -> None:
    if full:  # all is on the disk, from where it is read for a while
        world.await_all(server)
        place.node.flush()
        place.kill_node()
        place.start_node()
    else:
        place.node.clear()
    server.flush()
    asked = world.begin(server, 2)
    deadline = time.monotonic() + PATIENCE_S
    with contextlib.suppress(KVStrataError):
        while not reached(place):
            assert time.monotonic() < deadline, point
            if all(one.done() for one in asked):  # this machine was looking elsewhere
                if not full:
                    place.node.clear()
                server.flush()
                asked += world.begin(server)
    place.kill_node()
    for one in asked:
        one.result()
    place.start_node()
    await_node(place)
    world.await_all(server)


def test_a_node_that_hangs_is_waited_for_no_longer_than_is_set(
    place: Place, server: Server, world: World
) -> None:
    world.await_all(server)
    server.flush()
    began = time.monotonic()
    for prompt in world.prompts:
        world.ask(server, prompt)
    usual_s = time.monotonic() - began
    server.flush()
    pid = place.node.hello.pid
    asked = world.begin(server, 1)
    os.kill(pid, signal.SIGSTOP)
    try:
        for one in asked:
            one.result()
        world.slowest_s = 0.0
        server.flush()
        for prompt in world.prompts:
            world.ask(server, prompt)
        assert world.slowest_s < usual_s + SGLANG_S + REQUEST_S + SLACK_S
    finally:
        os.kill(pid, signal.SIGCONT)
    world.await_all(server)


WRONG = [
    ({"no.such.option": "1"}, "no.such.option"),
    ({"deadlines.load": "soon"}, "deadlines.load"),
]


@pytest.fixture(scope="module")
def failing(place: Place, world: World) -> Iterator[Server]:
    """One whose storage SGLang lets fail, and that starts with an option that is wrong."""
    environment = {"SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.5"}
    options, settings = {**FLOAT32, **ADMIN}, WRONG[0][0]
    with contextlib.closing(place.server(options, environment, settings=settings)) as server:
        yield server


def test_options_that_are_wrong_leave_it_uncached_and_say_why(
    place: Place, world: World, failing: Server
) -> None:
    said = 0
    for number, (settings, why) in enumerate(WRONG):
        if number:
            said = len(failing.log)
            place.detach(failing)
            place.attach(failing, settings)
        assert [world.hits(failing), world.hits(failing)] == [0, 0]
        told = failing.log[said:].splitlines()
        (line,) = [line for line in told if "leaves this engine's KV" in line]
        assert why in line
    assert "Traceback" not in failing.said


def test_failures_that_sglang_injects_change_no_answer(
    place: Place, world: World, failing: Server
) -> None:
    failing.wait()
    place.detach(failing)
    place.attach(failing)
    loaded, world.slowest_s = 0, 0.0
    for i in range(50):
        loaded += world.ask(failing, world.prompts[i % len(world.prompts)]).loaded
        if i % 3 == 2:
            failing.flush()
    assert "injector enabled" in failing.log
    assert loaded > 0
    assert "Traceback" not in failing.said
    assert world.slowest_s < SLACK_S
    place.check()
