"""Small objects that are ready at the same time are written by one call, and each is on its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest
from tests.support.nodes import chunk_keys, clear, flush, load, on_node, owned, store
from tests.support.sealed import an_object

from kvstrata.errors import CorruptObject, TierFull, TierUnavailable
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.common.background import Tasks
from kvstrata.node.node import Node
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.puts import SMALL_BYTES, Puts, Stored
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.observe.counters import Counters
from kvstrata.tiers.base import Limits, Outcome, Put
from kvstrata.tiers.memory import MemoryTier

ME = Client("pid 1")


class Watched(MemoryTier):
    """Notes how many objects come in a call, and fails or waits if it is told to."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.error: Exception | None = None
        self.failing: set[bytes] = set()
        self.gate = threading.Event()
        self.gate.set()
        if limits is not None:
            self.limits = limits

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        self.calls.append(len(puts))
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        outcomes = super().write(puts)
        return [
            Outcome.FAILED if put.object_id in self.failing else outcome
            for put, outcome in zip(puts, outcomes, strict=True)
        ]


class Bench:
    """Puts over a store, without a node."""

    def __init__(self, store: Watched, most: int = 8, deadline_s: float = 10.0) -> None:
        self.store = store
        self.counters = Counters()
        self.tripped: list[Exception] = []
        self.calls = TierCalls(
            "test", 4, deadline_s,
            counters=self.counters, clock=time.monotonic, trip=self.tripped.append,
        )  # fmt: skip
        self.pages = Scratch(4)
        self.tasks = Tasks(self.counters)
        self.puts = Puts(store, self.calls, self.pages, self.tasks, most)
        self.given_up: list[int] = []

    async def put(self, *objects: Stored) -> list[Outcome | BaseException]:
        return await asyncio.gather(
            *(
                self.puts.put(one, lambda number=number: self.given_up.append(number))  # type: ignore[misc]
                for number, one in enumerate(objects)
            ),
            return_exceptions=True,
        )


def stored(number: int, nbytes: int = 4096, epoch: int = 7) -> Stored:
    raw = bytes([number]) * nbytes
    data = an_object(raw, kind="native", order="test/plain", shape=(nbytes // 2,))
    return Stored(bytes([number]) * 32, data, epoch, if_absent=False)


def kept(store: Watched, one: Stored) -> bytes:
    into = bytearray(len(one.data))
    (length,) = store.read([one.name], [memoryview(into)])
    assert length == len(one.data)
    return bytes(into)


def test_one_call_for_all_that_come_together() -> None:
    async def test() -> None:
        bench = Bench(Watched())
        objects = [stored(number, epoch=number) for number in range(8)]
        assert await bench.put(*objects) == [Outcome.HIT] * 8
        assert bench.store.calls == [8]
        for number, one in enumerate(objects):
            written = kept(bench.store, one)
            assert decode(written[:HEADER_BYTES]).epoch == number, "another one's page"
            assert written[HEADER_BYTES:] == one.data[HEADER_BYTES:]
        assert await bench.put(stored(9)) == [Outcome.HIT]
        assert bench.store.calls == [8, 1]

    asyncio.run(test())


@pytest.mark.parametrize(
    ("limits", "most", "expected"),
    [
        (Limits(), 3, [2, 3, 3]),
        (Limits(batch_objects=2), 8, [2, 2, 2, 2]),
        (Limits(batch_bytes=4 * SMALL_BYTES), 8, [4, 4]),
        (Limits(batch_bytes=SMALL_BYTES), 8, [1] * 8),
        (Limits(), 1, [1] * 8),
    ],
)
def test_as_many_as_a_call_may_have(limits: Limits, most: int, expected: list[int]) -> None:
    async def test() -> None:
        bench = Bench(Watched(limits), most)
        assert await bench.put(*map(stored, range(8))) == [Outcome.HIT] * 8
        assert sorted(bench.store.calls) == expected

    asyncio.run(test())


def test_a_large_one_goes_alone() -> None:
    async def test() -> None:
        bench = Bench(Watched())
        objects = [stored(1), stored(2, SMALL_BYTES), stored(3)]
        assert await bench.put(*objects) == [Outcome.HIT] * 3
        assert sorted(bench.store.calls) == [1, 2]

    asyncio.run(test())


def test_a_damaged_header_is_its_own_affair() -> None:
    async def test() -> None:
        bench = Bench(Watched())
        bad = stored(2)
        bad.data[100] ^= 1
        first, second, third = await bench.put(stored(1), bad, stored(3))
        assert first is third is Outcome.HIT
        assert isinstance(second, CorruptObject)
        assert bench.store.calls == [2]
        (alone,) = await bench.put(bad)
        assert isinstance(alone, CorruptObject)
        assert bench.store.calls == [2], "nothing was left to write"

    asyncio.run(test())


def test_each_has_its_own_outcome() -> None:
    async def test() -> None:
        bench = Bench(Watched())
        bench.store.failing = {stored(2).name}
        expected = [Outcome.HIT, Outcome.FAILED, Outcome.HIT]
        assert await bench.put(stored(1), stored(2), stored(3)) == expected

    asyncio.run(test())


@pytest.mark.bugs
@pytest.mark.parametrize("error", [TierFull("no room"), ValueError("a bug")])
def test_a_call_that_fails_fails_them_all(error: Exception) -> None:
    async def test() -> None:
        bench = Bench(Watched())
        bench.store.error = error
        answers = await bench.put(stored(1), stored(2))
        assert all(isinstance(answer, TierUnavailable) for answer in answers)
        assert all(isinstance(answer, TierFull) for answer in answers) == (
            isinstance(error, TierFull)
        )
        bench.store.error = None
        assert await bench.put(stored(1), stored(2)) == [Outcome.HIT] * 2
        assert not len(bench.tasks)

    asyncio.run(test())


def test_a_call_that_hangs_is_given_up_by_all_and_ends_when_its_thread_does() -> None:
    async def test() -> None:
        bench = Bench(Watched(), deadline_s=0.02)
        bench.store.gate.clear()
        putting = asyncio.ensure_future(bench.put(stored(0), stored(1)))
        while len(bench.given_up) < 2:
            await asyncio.sleep(0.01)
        assert bench.given_up == [0, 1]
        assert len(bench.tripped) == 1
        assert not putting.done(), "a thread still reads them"
        bench.store.gate.set()
        assert await putting == [Outcome.HIT] * 2

    asyncio.run(test())


def test_who_waits_hears_when_all_is_stopped() -> None:
    async def test() -> None:
        bench = Bench(Watched())
        bench.store.gate.clear()
        putting = asyncio.ensure_future(bench.put(stored(0), stored(1)))
        while not bench.store.calls:
            await asyncio.sleep(0.01)
        await bench.tasks.cancel()
        answers = await asyncio.wait_for(putting, 10)
        assert all(isinstance(answer, asyncio.CancelledError) for answer in answers)
        bench.store.gate.set()

    asyncio.run(test())


def test_one_that_is_not_waited_for_any_more_is_nobody_elses_trouble() -> None:
    async def test() -> None:
        bench = Bench(Watched())
        bench.store.gate.clear()
        gone, stays = (
            asyncio.ensure_future(bench.puts.put(stored(number), lambda: None))
            for number in range(2)
        )
        while not bench.store.calls:
            await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        bench.store.gate.set()
        assert await stays is Outcome.HIT
        assert gone.cancelled()

    asyncio.run(test())


def test_a_node_writes_a_commit_of_small_chunks_in_few_calls() -> None:
    tier = Watched()

    async def test(node: Node) -> None:
        keys = chunk_keys(6)
        tier.gate.clear()
        store(node, ME, keys)
        while not tier.calls:
            await asyncio.sleep(0.01)
        tier.gate.set()
        await flush(node, ME)
        assert sum(tier.calls) == 6
        assert len(tier.calls) == 3, "two at a time, as it has two threads"
        await clear(node, ME, tiers=["host"])
        assert await load(node, ME, keys) == 6
        assert owned(node).index.claimed_bytes == 0

    on_node(test, tier=tier)
