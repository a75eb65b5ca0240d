"""The cache never takes the engine down: dead, stopped and missing nodes, broken and full disks.

A tiny model in float32, so that a batch that is cut otherwise rounds no token away: every answer
here, however it came about, must be the one that plain vLLM gives. Nothing is asserted of times
but the bounds that are promised, with room for a busy machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engine import Answer, Engine, Prompt, request, whole_chunks
from tests.engine.place import Place, eventually
from tests.engine.plain import Texts

from kvstrata.errors import KVStrataError, NodeUnavailable, UsageError
from kvstrata.header import object_id
from kvstrata.objects import HEADER_BYTES
from kvstrata.testing import models
from kvstrata.wire.client import NodeClient

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

NEW = 6
LENGTHS = (300, 700, 1100, 1500, 900, 2000, 500, 1300)
LOAD_S, REQUEST_S = 2.0, 0.5
# What a request may take beyond its deadlines on a machine that others use too.
SLACK_S = 60.0
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 4096, "num_gpu_blocks_override": 96}
SETTINGS = {
    "deadlines.load": f"{LOAD_S}s",
    "deadlines.request": "500ms",
    "host.capacity": "256MiB",
    "linger": "20s",
}


class World:
    """Prompts, what plain vLLM answers, and threads that ask while something is done to a node."""

    def __init__(self, prompts: list[Prompt], answers: list[list[int]]) -> None:
        self.prompts = prompts
        self._answers = {tuple(p): a for p, a in zip(prompts, answers, strict=True)}
        self._threads = ThreadPoolExecutor(4)

    def right(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
        wrong = [
            (len(prompt), answer.tokens, self._answers[tuple(prompt)])
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer.tokens != self._answers[tuple(prompt)]
        ]
        assert not wrong

    def ask(self, engine: Engine, prompts: Sequence[Prompt], in_turn: bool = True) -> list[Answer]:
        """Ask, and compare every token."""
        answers = engine.answers([request(p, NEW) for p in prompts], in_turn)
        self.right(prompts, answers)
        return answers

    def begin(
        self, engine: Engine, prompts: Sequence[Prompt], in_turn: bool = False
    ) -> Future[list[Answer]]:
        """Ask in a thread."""
        return self._threads.submit(self.ask, engine, prompts, in_turn)

    def hits(self, engine: Engine, prompts: Sequence[Prompt]) -> int:
        """Tokens that come from the node for these prompts now."""
        engine.forget()
        return sum(answer.cached for answer in self.ask(engine, prompts))

    def await_hits(self, engine: Engine, prompts: Sequence[Prompt]) -> None:
        """Hits come back by themselves: the first ask stores what a later one finds."""
        eventually(lambda: self.hits(engine, prompts) > 0, "hits are back")

    def await_all(self, engine: Engine, prompts: Sequence[Prompt]) -> None:
        """Every whole chunk hits."""
        whole = sum(whole_chunks(len(prompt)) for prompt in prompts)
        eventually(lambda: self.hits(engine, prompts) == whole, "it all hits")


def start(place: Place, **more: Any) -> Engine:
    return place.engine(**{**OPTIONS, **more})


def quiet(place: Place) -> dict[str, Any]:
    """Wait until nothing is held on the node; its status."""
    seen: dict[str, Any] = {}

    def nothing() -> bool:
        seen.update(node_of(place).status())
        leases = seen["leases"]
        return (leases["count"], leases["bytes"], leases["reservations"]) == (0, 0, 0)

    eventually(nothing, f"leases and reservations are given back: {seen.get('leases')}")
    assert not [name for name in seen["counters"] if name.startswith("bugs_")]
    return seen


def node_of(place: Place) -> NodeClient:
    """A client of the node that runs now, once there is one."""
    found: list[NodeClient] = []

    def there() -> bool:
        with contextlib.suppress(KVStrataError):
            place.node.status()
            found.append(place.node)
        return bool(found)

    eventually(there, "a node")
    return found[0]


def next_node(place: Place, engine: Engine, world: World) -> NodeClient:
    """A client of a node that an engine starts: an idle one starts none until it is asked."""
    world.ask(engine, world.prompts[:1])
    return node_of(place)


def end_service(place: Place) -> None:
    """Kill the node that `Place` started, if it did."""
    if place._service is not None:
        place._service.kill()
        place._service.wait()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def no_bug_in(engine: Engine) -> None:
    """In all that happened here, it met no exception that nobody had thought of."""
    log = engine.log
    assert "of a bug" not in log
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def world(tiny_llama: Path, tokenizer: models.Tokenizer) -> World:
    prompts = Texts(tokenizer, "faults").of(*LENGTHS)
    place = Place(tiny_llama)
    with place:
        engine = start(place, with_kvstrata=False)
        answers = engine.answers([request(prompt, NEW) for prompt in prompts])
        return World(prompts, [answer.tokens for answer in answers])


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, world: World) -> Iterator[tuple[Place, Engine, Engine]]:
    """Two engines that start at once on a machine without a node."""
    place = Place(tiny_llama, SETTINGS)
    with place:
        place.set("disk.path", str(place.folder / "disk"))
        place.set("disk.capacity", "1GiB")
        engines = start(place), start(place)
        for engine in engines:
            engine.wait()
        yield place, *engines
        for engine in engines:
            no_bug_in(engine)
        kill(node_of(place).hello.pid)  # it would linger


@contextlib.contextmanager
def nowhere(model: Path) -> Iterator[Place]:
    """A place whose node is not there, and is started by nobody but the test."""
    with Place(model, SETTINGS) as place:
        place.set("node", f"unix:{place.folder}/node.sock")
        yield place
        end_service(place)


@pytest.fixture(scope="module")
def lonely(tiny_llama: Path, world: World) -> Iterator[tuple[Place, Engine]]:
    """An engine that began without a node."""
    with nowhere(tiny_llama) as place:
        engine = start(place)
        engine.wait()
        yield place, engine
        no_bug_in(engine)


# a node that is not there, comes, goes, and comes back as another


def test_without_a_node_an_engine_starts_and_answers(tiny_llama: Path, world: World) -> None:
    with nowhere(tiny_llama) as place, Place(tiny_llama) as aside:
        # Side by side: what others do on this machine counts for both.
        plain, engine = start(aside, with_kvstrata=False), start(place)
        plain.wait()
        begun = time.monotonic()
        engine.wait()
        assert time.monotonic() - begun < 5.0 + 10.0
        assert sum(answer.cached for answer in world.ask(engine, world.prompts)) == 0
        assert engine.log.count("has no node") == 2, "the scheduler and the worker say it, once"
        no_bug_in(engine)
        with pytest.raises(NodeUnavailable):
            place.client()


def test_a_node_that_appears_is_joined(lonely: tuple[Place, Engine], world: World) -> None:
    place, engine = lonely
    end_service(place)
    world.ask(engine, world.prompts[:2])
    place._serve()
    world.await_hits(engine, world.prompts[:2])
    quiet(place)


def test_a_service_may_be_killed_and_started_again(
    lonely: tuple[Place, Engine], world: World
) -> None:
    place, engine = lonely
    for _ in range(2):
        end_service(place)
        place._serve()
        world.await_hits(engine, world.prompts)
        engine.forget()
        asked = world.begin(engine, world.prompts)
        time.sleep(0.05)
        end_service(place)
        asked.result()
        engine.forget()
        world.ask(engine, world.prompts, in_turn=False)
    place._serve()
    world.await_hits(engine, world.prompts)
    quiet(place)


def test_a_full_disk_makes_a_tier_read_only_and_nothing_worse(
    tiny_llama: Path, world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        with nowhere(tiny_llama) as place:
            fill_the_disk(place, folder, world)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_the_disk(place: Place, folder: Path, world: World) -> None:
    """On a file system of 8 MiB with 4 MiB in use, a tier that was promised 7."""
    place.set("disk.path", str(folder / "disk"))
    place.set("disk.capacity", "7MiB")
    (folder / "filler").write_bytes(bytes(4 << 20))
    place._serve()
    engine = start(place)
    node = node_of(place)
    asked = world.begin(engine, world.prompts, in_turn=True)
    states: set[str] = set()

    def read_only() -> bool:
        nonlocal asked
        (tier,) = node.status()["tiers"]
        states.add(tier["state"].partition(":")[0])
        if asked.done():
            asked.result()
            engine.forget()
            node.clear()
            asked = world.begin(engine, world.prompts, in_turn=True)
        return "read only" in states

    eventually(read_only, "the status says that the disk is full")
    asked.result()
    world.await_hits(engine, world.prompts)
    quiet(place)
    no_bug_in(engine)


# a node on demand, and two engines


def test_two_engines_that_start_at_once_share_one_node(
    pair: tuple[Place, Engine, Engine], world: World
) -> None:
    place, one, two = pair
    pids = {place.node.hello.pid}
    world.ask(one, world.prompts[:4])
    eventually(lambda: world.hits(two, world.prompts[:4]) > 3000, "two finds what one stored")
    # Whoever asks for the node by the same configuration finds the same one.
    pids.add(place.client().hello.pid)
    assert len(pids) == 1
    assert len(list((place.folder / "kvstrata").glob("*.sock"))) == 1
    quiet(place)


def test_killed_nodes_cost_hits_and_nothing_else(
    pair: tuple[Place, Engine, Engine], world: World
) -> None:
    """Seven kills in one engine's life, while it loads and stores, at moments of chance."""
    place, engine, _ = pair
    chance = random.Random(7)
    killed = set()
    for number in range(7):
        node = next_node(place, engine, world)
        node.clear(tiers=["host"])  # so that what is loaded has to be promoted first
        engine.forget()
        prompts = chance.sample(world.prompts, 6)
        asked = world.begin(engine, prompts, in_turn=number % 3 == 2)
        time.sleep(chance.choice([0.0, 0.02, 0.1, 0.3, 0.6]))
        killed.add(node.hello.pid)
        kill(node.hello.pid)
        asked.result(SLACK_S * 2)
        if number % 2:
            engine.forget()
            world.ask(engine, prompts, in_turn=False)  # without a node, or with the next one
    assert len(killed) == 7
    world.await_hits(engine, world.prompts)
    assert node_of(place).hello.pid not in killed
    quiet(place)
    free, whole = engine.free_blocks()
    assert free == whole, "no block has leaked"


@pytest.mark.parametrize("moment", ["match", "load", "store"])
def test_a_stopped_node_is_waited_for_until_the_deadline(
    pair: tuple[Place, Engine, Engine], world: World, moment: str
) -> None:
    place, engine, _ = pair
    node = next_node(place, engine, world)
    prompts = world.prompts[:5]
    if moment == "store":
        node.clear()
    else:
        world.await_hits(engine, prompts)
        quiet(place)
        node.flush()
        node.clear(tiers=["host"])
    engine.forget()
    pid = node.hello.pid
    if moment == "load":
        engine.call("stop_at_load", pid=pid)
    elif moment == "match":
        os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        asked = world.begin(engine, prompts)
        if moment == "store":
            time.sleep(0.2)
            os.kill(pid, signal.SIGSTOP)
        asked.result(SLACK_S + LOAD_S + REQUEST_S)
        # And what comes while it stands still, one after the other.
        for prompt in prompts[:2]:
            engine.forget()
            world.ask(engine, [prompt])
        assert time.monotonic() - begun < SLACK_S + 3 * (LOAD_S + REQUEST_S)
    finally:
        os.kill(pid, signal.SIGCONT)
    quiet(place)
    world.await_hits(engine, prompts)
    assert node_of(place).hello.pid == pid, "the same node goes on"
    quiet(place)
    free, whole = engine.free_blocks()
    assert free == whole


def test_a_node_that_stops_and_goes_again_and_again(
    pair: tuple[Place, Engine, Engine], world: World
) -> None:
    """At moments of chance, for longer than each deadline: match, load, reserve, commit."""
    place, engine, _ = pair
    chance = random.Random(3)
    world.await_hits(engine, world.prompts)
    pid = node_of(place).hello.pid
    for number in range(6):
        if number % 2:
            node_of(place).clear(tiers=["host"])
        if number % 3 == 2:
            node_of(place).clear()
        engine.forget()
        asked = world.begin(engine, world.prompts, in_turn=number == 4)
        while not asked.done():
            time.sleep(chance.uniform(0.0, 0.3))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(chance.choice([0.02, 1.5 * REQUEST_S, 1.2 * LOAD_S]))
            os.kill(pid, signal.SIGCONT)
        asked.result()
    quiet(place)
    world.await_hits(engine, world.prompts)
    assert node_of(place).hello.pid == pid
    quiet(place)


def test_a_broken_file_is_a_counted_miss(pair: tuple[Place, Engine, Engine], world: World) -> None:
    place, engine, _ = pair
    prompts = world.prompts[1:5]
    world.await_all(engine, prompts)
    quiet(place)
    node = node_of(place)
    node.flush()

    def files(prompt: Prompt) -> list[Path]:
        objects = place.folder / "disk" / "objects"
        return [
            next(objects.rglob(f"*{object_id(key, 0, 0).hex()}*")) for key in engine.keys(prompt)
        ]

    def flip(prompt: Prompt) -> None:
        with files(prompt)[1].open("r+b") as file:
            file.seek(HEADER_BYTES + 5000)
            byte = file.read(1)
            file.seek(HEADER_BYTES + 5000)
            file.write(bytes([byte[0] ^ 4]))

    def truncate(prompt: Prompt) -> None:
        os.truncate(files(prompt)[1], HEADER_BYTES * 2)

    def zero(prompt: Prompt) -> None:
        path = files(prompt)[1]
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(bytes(size - size // 2))

    def swap(prompt: Prompt) -> None:
        first, second, *_ = files(prompt)
        aside = first.with_name("aside")
        first.rename(aside)
        second.rename(first)
        aside.rename(second)

    def lost() -> float:
        counters = node.status()["counters"]
        names = ("corrupt_objects_total", 'promotions_total{outcome="failed"}')
        return float(sum(v for k, v in counters.items() if k.startswith(names)))

    for damage, prompt in zip((flip, truncate, zero, swap), prompts, strict=True):
        node.flush()
        damage(prompt)
        node.clear(engine.keys(prompt), ["host"])
        engine.forget()
        before = lost()
        (answer,) = world.ask(engine, [prompt])
        assert place.loaded(prompt, answer) < whole_chunks(len(prompt)), damage.__name__
        assert lost() > before, damage.__name__
        # What was broken is gone, so a recompute stores it again, here and on disk.
        world.await_all(engine, [prompt])
        node.flush()
        node.clear(engine.keys(prompt), ["host"])
        assert world.hits(engine, [prompt]) == whole_chunks(len(prompt))
    quiet(place)


@pytest.mark.parametrize("what", ["stores", "loads"])
def test_a_killed_engine_leaves_nothing_behind(
    pair: tuple[Place, Engine, Engine], world: World, what: str
) -> None:
    place, other, _ = pair
    victim = start(place)
    victim.wait()
    node = node_of(place)

    def begin() -> Future[list[Answer]]:
        if what == "stores":
            node.clear()
        else:
            world.await_hits(victim, world.prompts)
            node.clear(tiers=["host"])
        victim.forget()
        return world.begin(victim, world.prompts)

    def busy() -> bool:
        leases = node.status()["leases"]
        return bool(leases["count"] if what == "loads" else leases["reservations"])

    asked, deadline = begin(), time.monotonic() + SLACK_S
    while not busy():
        assert time.monotonic() < deadline, f"no {what} were ever seen"
        if asked.done():
            asked = begin()
    kill(victim.pid)
    victim._process.wait()
    died = time.monotonic()
    quiet(place)
    # A second is promised; the rest is for the two cores that everybody here shares.
    assert time.monotonic() - died < 1.0 + 14.0
    with pytest.raises(UsageError):
        asked.result(SLACK_S)
    world.await_hits(other, world.prompts)
    quiet(place)
