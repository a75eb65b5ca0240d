"""Three machines of a fleet under load, and one node after the other is killed in the middle of it.

Each engine has a node of its own; the nodes are one another's peers and share one Redis. A tiny
model in float32, as in ``test_faults.py``: however a batch is cut and whatever of a prompt was
loaded, the answer is one that plain vLLM gives, to the last token.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.engine.checked_node import CODE
from tests.engine.engine import Engine, Prompt, request
from tests.engine.place import Place, eventually
from tests.engine.plain import Texts
from tests.engine.shared import Engines

from kvstrata.testing.ports import HOST, free_port

pytestmark = pytest.mark.engine

NEW = 6
DOCUMENTS, QUESTIONS = (420, 700, 1150, 1500, 900, 600), (30, 90, 200)
AT_ONCE = 5
TIERS = ("peer", "redis")


class Member(NamedTuple):
    """A machine: a node as a service, and an engine."""

    place: Place
    engine: Engine

    def hits(self, tier: str) -> float:
        """Chunks that its node, the one that runs now, had from a tier."""
        return self.place.count(f'hit_chunks_total{{tier="{tier}"}}')

    def hears(self, tier: str) -> bool:
        """Whether a tier of its node is in service."""
        tiers = self.place.node.status()["tiers"]
        return any(one["name"] == tier and one["state"] == "ok" for one in tiers)

    @property
    def busy(self) -> bool:
        """Whether its engine loads or stores at this moment."""
        held = self.place.node.status()["leases"]
        return bool(held["count"] or held["reservations"])


class World:
    """Prompts that share beginnings, and every answer that plain vLLM gives to each."""

    def __init__(self, prompts: list[Prompt], engine: Engine) -> None:
        engine.forget()
        self.prompts = prompts
        self._allowed: list[set[tuple[int, ...]]] = [set() for _ in prompts]
        asked = [request(prompt, NEW) for prompt in prompts]
        for in_turn in (True, False):  # alone and in a batch, upon no hit and upon its own
            for _ in range(2):
                for allowed, answer in zip(
                    self._allowed, engine.answers(asked, in_turn), strict=True
                ):
                    allowed.add(tuple(answer.tokens))
            engine.forget()

    def right(self, number: int, tokens: list[int]) -> bool:
        return tuple(tokens) in self._allowed[number]


class Load:
    """Asks one engine without a pause, several prompts at once, and judges every answer."""

    def __init__(self, engine: Engine, world: World, seed: int) -> None:
        self._engine = engine
        self._world = world
        self._draw = random.Random(seed)
        self.num_right = 0
        self.wrong: list[tuple[int, list[int]]] = []

    def run(self, enough: threading.Event) -> None:
        numbers = range(len(self._world.prompts))
        while not enough.is_set():
            self._engine.forget()  # or its own cache would answer soon
            batch = self._draw.sample(numbers, AT_ONCE)
            asked = [request(self._world.prompts[number], NEW) for number in batch]
            for number, answer in zip(
                batch, self._engine.answers(asked, in_turn=False), strict=True
            ):
                if self._world.right(number, answer.tokens):
                    self.num_right += 1
                else:
                    self.wrong.append((number, answer.tokens))


class Fleet:
    """The members, and a load on each of them."""

    def __init__(self, members: list[Member], world: World) -> None:
        self.members = members
        self._enough = threading.Event()
        self._loads = [Load(one.engine, world, seed) for seed, one in enumerate(members)]
        self._threads = ThreadPoolExecutor(len(members))
        self._running: list[Future[None]] = []

    def __enter__(self) -> Fleet:
        self._running = [self._threads.submit(load.run, self._enough) for load in self._loads]
        return self

    def __exit__(self, *exception: object) -> None:
        self._enough.set()
        self._threads.shutdown()

    def until(self, true: Callable[[], bool], what: str) -> None:
        """As `eventually`, while all of them are asked and answer."""

        def going() -> bool:
            for running in self._running:
                if running.done():
                    running.result()
            return true()

        eventually(going, what)

    def answer(self, count: int) -> None:
        """Return when each has answered so many more."""
        before = [load.num_right for load in self._loads]
        self.until(
            lambda: all(
                load.num_right >= had + count for load, had in zip(self._loads, before, strict=True)
            ),
            "each of them answers",
        )

    def end(self) -> int:
        """Ask no more; how many were answered, all of them rightly."""
        self._enough.set()
        for running in self._running:
            running.result()
        assert [load.wrong for load in self._loads] == [[]] * len(self._loads)
        return sum(load.num_right for load in self._loads)


def shared(members: list[Member]) -> float:
    """Chunks that came from others."""
    return sum(one.hits(tier) for one in members for tier in TIERS)


@pytest.fixture
def members(tiny_llama: Path, tmp_path: Path) -> Iterator[list[Member]]:
    from kvstrata.testing.servers.redis import RedisServer

    addresses = [f"{HOST}:{free_port()}" for _ in range(3)]
    with ExitStack() as ends:
        redis = RedisServer(tmp_path / "redis")
        ends.callback(redis.close)
        made = []
        for address in addresses:
            settings = {
                "secret_file": str(tmp_path / "secret"),
                # Too little for all of it, so that there is always something to load.
                "host.capacity": "16MiB",
                "deadlines.load": "2s",
                "deadlines.request": "2s",
                "network.listen": address,
                "peer.nodes": ", ".join(other for other in addresses if other != address),
                "peer.lookup_timeout": "100ms",
                "redis.url": redis.url,
                "redis.lookup_timeout": "100ms",
                "redis.epoch_every": "1s",
            }
            place = ends.enter_context(Place(tiny_llama, settings, CODE))
            made.append(Member(place, place.engine(dtype="float32")))
        yield made


@pytest.fixture
def world(engines: Engines, tiny_llama: Path, texts: Texts, members: list[Member]) -> World:
    """After the members, which start meanwhile."""
    questions = texts.of(*QUESTIONS)
    prompts = [text + question for text in texts.of(*DOCUMENTS) for question in questions]
    return World(prompts, engines.plain(tiny_llama, dtype="float32").engine)


def kill_and_start(fleet: Fleet, victim: Member) -> None:
    """Kill a node in the middle of something, and start another one in its place later."""
    others = [one for one in fleet.members if one is not victim]
    fleet.until(lambda: victim.busy, "it is in the middle of something")
    victim.place.kill_node()
    before = shared(others)
    fleet.answer(2 * AT_ONCE)
    fleet.until(lambda: shared(others) > before, "the others go on sharing")
    victim.place.start_node()
    fleet.until(
        lambda: shared([victim]) > 0,
        "its engine has found the new node, which has found the others",
    )


def test_each_node_is_killed_under_load(members: list[Member], world: World) -> None:
    """None of them is missed: not one request fails, not one answer is another."""
    for one in members:
        one.engine.wait()
        for tier in TIERS:
            eventually(partial(one.hears, tier), f"a node hears of {tier}")
    with Fleet(members, world) as fleet:
        fleet.until(
            lambda: all(one.hits(tier) for one in members for tier in TIERS),
            "each has had something from its peers and from the store",
        )
        for victim in members:
            kill_and_start(fleet, victim)
        fleet.answer(2 * AT_ONCE)
        assert fleet.end() > 100
    for one in members:
        one.place.check()
        assert not one.place.count("corrupt_objects_total")
        one.engine.forget()
        free, whole = one.engine.free_blocks()
        assert free == whole, "no block has leaked"
        for words in ("of a bug", "Traceback"):
            assert words not in one.engine.log
        one.place.stop_node()
