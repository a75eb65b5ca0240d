"""Loads that are computed from the front while they arrive from the end, in vLLM's scheduler.

The node plans a meeting wherever two chunks or more have to be brought; where it ends up is the
tier's doing, which lets through as many reads as a test says. Whatever is computed or read on a
wrong prefix is seen by the rig's arithmetic.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tests.connector.fake_model import BLOCK, CHUNK
from tests.connector.gates import TIMEOUT_S, tiered
from tests.connector.rig import Rig, prompt

import kvstrata.node.matching as matching
from kvstrata.node.common.planner import Meeting
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.memory import MemoryTier

Make = Callable[..., Rig]

ON = {"meet": "on", "planner": "on", "host.capacity": "8MiB"}
CHUNKS = 8


class CountedTier(MemoryTier):
    """Lets through as many reads as it is told; a read that is not let through fails in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = threading.Semaphore(0)
        self.free = threading.Event()
        self.free.set()
        self.broken: set[int] = set()  # numbers of reads, from 0 on, that miss
        self.num_reads = 0
        self.delay: Callable[[], float] = lambda: 0.0

    def shut(self) -> None:
        self.free.clear()

    def let(self, count: int) -> None:
        """So many reads more."""
        for _ in range(count):
            self.turns.release()

    def open(self) -> None:
        self.free.set()
        self.let(64)

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        if not self.free.is_set():
            self.turns.acquire(timeout=TIMEOUT_S)
        number, self.num_reads = self.num_reads, self.num_reads + 1
        if pause := self.delay():
            time.sleep(pause)
        if number in self.broken:
            return [Outcome.MISS] * len(ids)
        return super().read(ids, into)


@pytest.fixture(autouse=True)
def meets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A meeting is always worth it."""
    planned: list[int] = []

    def always(tiers: bytes, *_: Any) -> Meeting | None:
        here = next((i for i, tier in enumerate(tiers) if tier), len(tiers))
        if len(tiers) - here < 2:
            return None
        planned.append(len(tiers))
        return Meeting(here + 1, -1e-9)

    monkeypatch.setattr(matching, "meeting", always)
    return planned


def slow(make_rig: Make, tier: CountedTier, **options: Any) -> Rig:
    """A rig that has proven that it can compute, and knows a prompt that only the tier has."""
    extra = {**ON, **options.pop("extra", {})}
    rig = make_rig(make_node=tiered(tier), extra=extra, **options)
    rig.ask(prompt(3 * BLOCK + 5, seed=77))
    rig.ask(prompt(4 * BLOCK + 5, seed=78))
    assert rig.side._meets.proven
    rig.warm(prompt(CHUNKS * CHUNK + 5))
    rig.drop_host()
    rig.forward.computed.clear()
    return rig


def begin(rig: Rig, **options: Any) -> str:
    """Ask for the prompt, and step until its load is in the worker's hands."""
    name = rig.add(prompt(CHUNKS * CHUNK + 5), **options)
    rig.until(lambda: rig.step().async_loads != [] or not rig.scheduler.has_requests())
    return name


def last(rig: Rig, length: int = CHUNKS * CHUNK + 5) -> dict[str, Any]:
    rig.settle()
    return next(r for r in rig.state()["requests"][::-1] if r["prompt_tokens"] == length)


def positions(rig: Rig) -> list[int]:
    """Everything that was computed inside loads, in order."""
    return [position for some in rig.forward.computed for position in some]


def test_nothing_arrives_and_all_is_computed(make_rig: Make) -> None:
    tier = CountedTier()
    rig = slow(make_rig, tier)
    tier.shut()
    begin(rig)
    rig.run()
    assert positions(rig) == list(range(CHUNKS * CHUNK))
    tier.open()
    assert last(rig)["met_tokens"] == CHUNKS * CHUNK
    assert last(rig)["loaded_tokens"] == 0
    rig.check()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_has_arrived_is_not_computed(make_rig: Make, count: int) -> None:
    tier = CountedTier()
    rig = slow(make_rig, tier)
    tier.shut()
    tier.let(count)
    arrived = threading.Event()

    def before() -> None:
        # The first slice waits until so much has come.
        rig.until(lambda: next(iter(meetings(rig))).loaded == CHUNKS - count)
        arrived.set()

    rig.forward.before = before
    begin(rig)
    rig.run()
    assert arrived.is_set()
    assert positions(rig) == list(range((CHUNKS - count) * CHUNK))
    tier.open()
    told = last(rig)
    assert (told["met_tokens"], told["loaded_tokens"]) == ((CHUNKS - count) * CHUNK, count * CHUNK)
    assert told["tier_tokens"] == {"memory": count * CHUNK}
    rig.check()


def meetings(rig: Rig) -> list[Any]:
    fronts = rig.workers[0]._fronts
    assert fronts is not None
    return list(fronts.meetings._under_way.values())


def test_a_busy_engine_computes_none_of_it(make_rig: Make) -> None:
    tier = CountedTier()
    rig = slow(make_rig, tier)
    tier.shut()
    rig.forward.most_tokens = CHUNK - 1
    begin(rig)
    for _ in range(5):
        rig.step()
    assert positions(rig) == []
    tier.open()
    rig.run()
    assert last(rig)["loaded_tokens"] == CHUNKS * CHUNK
    rig.check()


def test_a_step_computes_no_more_than_it_may(make_rig: Make) -> None:
    tier = CountedTier()
    rig = slow(make_rig, tier)
    tier.shut()
    rig.forward.most_tokens = CHUNK
    begin(rig)
    rig.run()
    assert {len(some) for some in rig.forward.computed} == {CHUNK}
    tier.open()
    rig.check()


def test_what_vllm_has_is_not_computed(make_rig: Make) -> None:
    """vLLM's own hit ends inside a chunk; its blocks are shared, and nothing is written there."""
    tier = CountedTier()
    rig = slow(make_rig, tier)
    rig.ask([*prompt(CHUNKS * CHUNK + 5)[: CHUNK + BLOCK], 1])
    tier.shut()
    rig.forward.computed.clear()
    begin(rig)
    rig.run()
    assert positions(rig) == list(range(CHUNK + BLOCK, CHUNKS * CHUNK))
    tier.open()
    rig.check()


def test_what_is_in_host_memory_is_not_computed(make_rig: Make) -> None:
    tier = CountedTier()
    rig = slow(make_rig, tier)
    rig.ask(prompt(CHUNKS * CHUNK + 5)[: 2 * CHUNK + 1])
    rig.settle()
    rig.reset()
    rig.forward.computed.clear()
    tier.shut()
    begin(rig)
    rig.run()
    assert positions(rig) == list(range(2 * CHUNK, CHUNKS * CHUNK))
    tier.open()
    told = last(rig)
    assert told["tier_tokens"]["host"] == told["loaded_tokens"] == 2 * CHUNK
    rig.check()


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_chunk_that_does_not_come(make_rig: Make, bad: int, pipelined: bool) -> None:
    """What was computed until then stays, and vLLM computes the rest.

    It is stored again, by this request or, where that met what came without the chunk, the next.
    """
    tier = CountedTier()
    rig = slow(make_rig, tier, pipelined=pipelined)
    tier.broken = {tier.num_reads + bad}
    rig.forward.most_tokens = CHUNK
    begin(rig)
    rig.run()
    assert len(rig.cut) <= 1
    told = last(rig)
    assert told["loaded_tokens"] + told["met_tokens"] <= CHUNKS * CHUNK
    rig.check()

    def is_back() -> bool:
        found = rig.ask(prompt(CHUNKS * CHUNK + 5))
        rig.check()
        return found == CHUNKS * CHUNK

    rig.until(is_back)


def test_the_node_goes_while_both_are_at_it(make_rig: Make) -> None:
    tier = CountedTier()
    rig = slow(make_rig, tier)
    rig.forward.most_tokens = CHUNK
    tier.shut()
    tier.let(2)
    begin(rig)
    rig.until(lambda: next(iter(meetings(rig))).loaded == CHUNKS - 2)
    rig.step()
    ending = threading.Thread(target=rig.stop_node)

    def before() -> None:
        # Its last reads come back only once it has gone, or all might arrive before.
        if ending.ident is None:
            ending.start()
            rig.until(lambda: meetings(rig)[0].failed)
            tier.open()
            ending.join()

    rig.forward.before = before
    rig.run()
    assert rig.wrong() == []
    assert rig.cut
    assert 0 < len(positions(rig)) < (CHUNKS - 2) * CHUNK
    rig.start_node()
    rig.attach()
    rig.check()


def test_a_load_that_is_too_late(make_rig: Make) -> None:
    tier = CountedTier()
    rig = slow(make_rig, tier, extra={"deadlines.load": "200ms"})
    rig.forward.most_tokens = CHUNK
    rig.forward.before = lambda: time.sleep(0.06)
    tier.shut()
    begin(rig)
    rig.run()
    assert rig.cut
    assert 0 < len(positions(rig)) < CHUNKS * CHUNK
    tier.open()
    rig.check()


def test_computing_fails(make_rig: Make, caplog: pytest.LogCaptureFixture) -> None:
    tier = CountedTier()
    rig = slow(make_rig, tier)
    tier.shut()
    rig.forward.most_tokens = 2 * CHUNK

    def fail() -> None:
        if rig.forward.computed:
            raise RuntimeError("out of memory")

    rig.forward.before = fail
    begin(rig)
    rig.run()
    assert rig.cut
    assert "out of memory" in caplog.text
    tier.open()
    rig.check()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_request_that_is_aborted(make_rig: Make, after: int) -> None:
    """Its blocks are withheld until nobody writes to them; others get them then."""
    tier = CountedTier()
    rig = slow(make_rig, tier, num_blocks=24)
    rig.forward.most_tokens = CHUNK
    tier.shut()
    tier.let(2)
    name = begin(rig)
    for _ in range(after):
        rig.step()
    rig.abort(name)
    computed = len(positions(rig))
    rig.ask(prompt(10 * BLOCK, seed=5), 3)
    assert len(positions(rig)) <= computed + CHUNK
    tier.open()
    rig.check()


def test_one_that_decodes_goes_on(make_rig: Make) -> None:
    tier = CountedTier()
    rig = slow(make_rig, tier)
    rig.forward.most_tokens = CHUNK + 1
    tier.shut()
    decoding = rig.add(prompt(20, seed=9), 40)
    rig.step()
    begin(rig)
    rig.until(lambda: meetings(rig)[0].ready)
    before = len(rig.answers[decoding])
    for _ in range(4):
        rig.step()
    assert len(rig.answers[decoding]) == before + 4
    assert len(positions(rig)) >= 4 * CHUNK
    rig.run()
    tier.open()
    rig.check()


def test_a_test_that_fails_leaves_it_off(
    make_rig: Make, meets: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    tier = CountedTier()
    rig = make_rig(make_node=tiered(tier), extra=ON)
    rig.proof.why = "layer 3 computes something else"
    rig.warm(prompt(CHUNKS * CHUNK + 5))
    rig.drop_host()
    assert len(rig.proof.trials) == 1
    assert "layer 3 computes something else" in caplog.text
    assert rig.ask(prompt(CHUNKS * CHUNK + 5)) == CHUNKS * CHUNK
    assert (meets, positions(rig)) == ([], [])
    rig.check()


def test_it_is_off_unless_asked_for(make_rig: Make, meets: list[int]) -> None:
    rig = make_rig(make_node=tiered(CountedTier()), extra={**ON, "meet": "off"})
    rig.warm(prompt(CHUNKS * CHUNK + 5))
    rig.drop_host()
    assert rig.workers[0]._fronts is None
    assert rig.ask(prompt(CHUNKS * CHUNK + 5)) == CHUNKS * CHUNK
    assert meets == []
    rig.check()


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_histories(make_rig: Make, pipelined: bool, seed: int, meets: list[int]) -> None:
    """Several at once, of which some end, share beginnings or lack blocks, over a moody link."""
    draw = random.Random(seed)
    tier = CountedTier()
    rig = make_rig(num_blocks=48, pipelined=pipelined, make_node=tiered(tier),
                   extra={**ON, "inside": "on"})  # fmt: skip
    moods = random.Random(seed + 1)
    tier.delay = lambda: moods.choice([0.0, 0.0, 0.001, 0.004])
    said = [prompt(draw.randint(100, 250), number) for number in range(4)]
    for tokens in said:
        rig.ask(tokens)
    for number in range(100):
        rig.forward.most_tokens = draw.choice([CHUNK, 3 * CHUNK, 2048])
        if draw.random() < 0.1:
            tier.broken = {tier.num_reads + draw.randint(0, 5)}
        base = draw.choice(said)
        at = draw.choice([len(base), draw.randint(0, len(base))])
        asked = [*base[:at], *(number * 100 + 10_000 + i for i in range(draw.randint(1, 20)))]
        name = rig.add(asked[:300], draw.randint(1, 12))
        for _ in range(draw.randint(0, 8)):
            rig.step()
        if draw.random() < 0.15 and name in rig.scheduler.requests:
            rig.abort(name)
        if draw.random() < 0.4:
            rig.run()
            rig.settle()
            rig.reset()
        if draw.random() < 0.4:
            rig.drop_host()
    rig.run()
    assert len(meets) > 10
    assert len(positions(rig)) > 10 * CHUNK
    rig.check()
