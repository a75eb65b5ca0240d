"""Prompts that are computed from the front while they arrive from the end, in a real vLLM.

A link so slow that the two meet somewhere in between. Every answer must be the one that plain vLLM
gives: in float32 however the prompt was cut, in bfloat16 where it is cut alike, a chunk at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.engine import meeting_node
from tests.engine.engine import CHUNK, Engine, Prompt, request
from tests.engine.place import Place, eventually
from tests.engine.plain import Texts

from kvstrata.header import object_id
from kvstrata.objects import HEADER_BYTES

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

LENGTHS = (1500, 1100, 1411)
NEW = 8
CALM: dict[str, Any] = {"dtype": "float32", "max_model_len": 2048}
TP = {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
FAST = 1e9


class Link:
    """A place whose node has a disk behind a link."""

    def __init__(self, folder: Path, model: Path, **settings: str) -> None:
        self._speed, self._disk = folder / "speed", folder / "disk"
        self.speed(FAST)
        every = {
            "meet": "on", "planner": "on", "host.capacity": "256MiB", "disk.capacity": "1GiB",
            "disk.path": str(self._disk), "disk.codec": "raw", "disk.scrub_rate": "0",
            "deadlines.load": "20s", **settings,
        }  # fmt: skip
        self.place = Place(model, every, meeting_node.code(self._speed))

    def speed(self, bytes_per_s: float) -> None:
        self._speed.write_text(str(bytes_per_s))

    def file(self, key: bytes) -> Path:
        """The disk's file of one chunk."""
        (path,) = (self._disk / "objects").rglob(f"{object_id(key, 0, 0).hex()}-*.kvo")
        return path

    def only_disk(self, engine: Engine, prompts: list[Prompt], ranks: int = 1) -> None:
        """Have the disk alone know these prompts."""
        self.place.await_stored(engine, prompts, ranks)
        self.place.flush()
        self.place.node.clear(tiers=["host"])
        engine.forget()

    def met(self, prompt: Prompt) -> tuple[int, int]:
        """Tokens of the prompt's last request that were computed inside its load, and loaded."""
        record = self.place.last_record(len(prompt) + NEW)
        return record["met_tokens"], record["loaded_tokens"]


@contextlib.contextmanager
def linked(folder: Path, model: Path, **settings: str) -> Iterator[Link]:
    link = Link(folder, model, **settings)
    with link.place:
        yield link


def answer(engine: Engine, prompts: list[Prompt]) -> list[list[int]]:
    return [one.tokens for one in engine.answers([request(p, NEW) for p in prompts])]


def bytes_of_a_chunk(link: Link, engine: Engine) -> float:
    status = link.place.node.status()
    (disk,) = (tier for tier in status["tiers"] if tier["name"] == "disk")
    size: float = disk["used_bytes"] / disk["num_objects"]
    return size


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(CALM, id="float32"),
        pytest.param({**CALM, "enforce_eager": False}, id="float32-compiled"),
        pytest.param({**CALM, **TP}, id="float32-two-ranks"),
        pytest.param(
            {"max_model_len": 2048, "max_num_batched_tokens": CHUNK}, id="bfloat16-cut-alike"
        ),
    ],
)
def test_every_token_is_the_same(
    tmp_path: Path, tiny_llama: Path, texts: Texts, options: dict[str, Any]
) -> None:
    ranks = options.get("tensor_parallel_size", 1)
    prompts = texts.of(*LENGTHS)
    with linked(tmp_path, tiny_llama) as link:
        engine = link.place.engine(**options)
        wanted = answer(engine, prompts)
        link.only_disk(engine, prompts, ranks)
        met = []
        for chunk_s in (0.01, 0.003):
            link.speed(bytes_of_a_chunk(link, engine) * ranks / chunk_s)
            for prompt, tokens in zip(prompts, wanted, strict=True):
                assert answer(engine, [prompt]) == [tokens]
                computed, loaded = link.met(prompt)
                assert computed + loaded == len(prompt) // CHUNK * CHUNK
                met.append((computed, loaded))
            link.only_disk(engine, prompts, ranks)
        print(options, met)
        assert sum(computed > 0 and loaded > 0 for computed, loaded in met) >= 2
        link.place.check()


class World:
    """Prompts that only the disk has, and what is answered to them."""

    def __init__(self, link: Link, engine: Engine) -> None:
        self.link, self.engine = link, engine
        self.threads = ThreadPoolExecutor(1)

    def set(self, prompts: list[Prompt], chunk_s: float) -> list[list[int]]:
        """Have the disk alone know these prompts, over a link that takes so long for a chunk."""
        self.link.speed(FAST)
        wanted = answer(self.engine, prompts)
        self.link.only_disk(self.engine, prompts)
        self.link.speed(bytes_of_a_chunk(self.link, self.engine) / chunk_s)
        return wanted


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[World]:
    """An engine that computes a chunk or two in a step, and three prompts on the disk."""
    with linked(tmp_path_factory.mktemp("link"), tiny_llama) as link:
        yield World(link, link.place.engine(**CALM, max_num_batched_tokens=2 * CHUNK))


def test_several_at_once_beside_one_that_decodes(world: World, texts: Texts) -> None:
    prompts = texts.of(*LENGTHS)
    wanted = world.set(prompts, 0.01)
    decoding = request(texts.of(40)[0], 60)
    alone = world.engine.answers([decoding])[0].tokens
    asked = [decoding, *(request(p, NEW) for p in prompts)]
    for _ in range(2):
        told = [one.tokens for one in world.engine.answers(asked, in_turn=False)]
        assert told == [alone, *wanted]
        world.link.only_disk(world.engine, prompts)
    assert world.link.place.count('plans_total{decision="meet"}') >= len(prompts)
    world.link.place.check()


@pytest.mark.parametrize("number", [0, 4, 10])
def test_a_damaged_chunk(world: World, texts: Texts, number: int) -> None:
    prompts = texts.of(1500)
    wanted = world.set(prompts, 0.01)
    file = world.link.file(world.engine.keys(prompts[0])[number])
    file.write_bytes(file.read_bytes()[: HEADER_BYTES + 100] + bytes(file.stat().st_size))
    assert answer(world.engine, prompts) == wanted
    # What was computed stays; the damaged chunk, if it came to be read, was not loaded.
    computed, loaded = world.link.met(prompts[0])
    assert computed + loaded <= 11 * CHUNK
    world.engine.forget()
    assert answer(world.engine, prompts) == wanted
    world.link.place.check()


def test_aborts(world: World, texts: Texts) -> None:
    """Their blocks come back, and what others compute in them is right."""
    prompts = texts.of(*LENGTHS)
    wanted = world.set(prompts, 0.02)
    before = world.engine.free_blocks()
    asked = [request(prompt, NEW) for prompt in prompts for _ in range(2)]
    outputs = world.engine.call("abort_soon", requests=asked, steps=[3, 5, 8, -1, 2, 12])["outputs"]
    assert wanted[1] in [one["tokens"] for one in outputs.values()]
    assert answer(world.engine, prompts) == wanted
    world.engine.forget()
    assert world.engine.free_blocks() == before
    world.link.place.check()


@pytest.mark.parametrize("after_s", [0.01, 0.05, 0.12])
def test_a_node_that_dies_meanwhile(world: World, texts: Texts, after_s: float) -> None:
    prompts = texts.of(1900)
    wanted = world.set(prompts, 0.05)
    world.engine.call("about")
    asked = world.threads.submit(answer, world.engine, prompts)
    time.sleep(after_s)
    world.link.place.kill_node()
    assert asked.result(60) == wanted
    world.link.place.start_node()

    def hits() -> bool:
        world.engine.forget()
        return world.engine.answers([request(prompts[0], NEW)])[0].cached > 0

    world.link.speed(FAST)
    eventually(hits, "the engine is attached again")
    assert answer(world.engine, prompts) == wanted
