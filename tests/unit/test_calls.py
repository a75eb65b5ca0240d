"""Calls into a tier: who waits for them hears of their end, or that none comes to its end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from kvstrata.errors import TierUnavailable
from kvstrata.node.service import calls
from kvstrata.node.service.calls import Lane, Timed

LONG_S = 1000.0


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "GRACE_S", 0.02)


class Bench:
    """A lane of two threads, and what it said of its tier."""

    def __init__(self, deadline_s: float) -> None:
        self.tripped: list[TierUnavailable] = []
        self.lane = Lane("test", 2, 0, deadline_s, time.monotonic, self.tripped.append)
        self.gate = threading.Event()

    def call(self, work: Callable[[], Any] | None = None) -> asyncio.Future[Any]:
        """A call, by default one that ends when the gate opens."""
        return asyncio.ensure_future(self.lane.run("call", work or self._wait))

    def _wait(self) -> str:
        assert self.gate.wait(30)
        return "ended"


def test_what_it_returns_and_what_it_raises() -> None:
    async def test() -> None:
        bench = Bench(LONG_S)
        assert await bench.call(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await bench.call(lambda: 1 // 0)
        assert bench.lane.num_under_way == 0

    asyncio.run(test())


def test_what_a_call_took_is_known_though_it_raises() -> None:
    def work() -> None:
        time.sleep(0.02)
        raise OSError("gone")

    timed = Timed(work)
    assert timed.seconds is None
    with pytest.raises(OSError, match="gone"):
        timed()
    assert timed.seconds is not None
    assert 0.02 <= timed.seconds < 30


def test_a_call_that_does_not_end_is_given_up() -> None:
    async def test() -> None:
        bench = Bench(0.05)
        hung, behind = [bench.call() for _ in range(2)], bench.call()
        with pytest.raises(TierUnavailable, match=r"no call has ended for 0\.05 s"):
            await behind  # which never began
        assert bench.lane.stuck
        assert not any(one.done() for one in hung), "their threads still run"
        bench.gate.set()
        assert await asyncio.gather(*hung) == ["ended", "ended"]
        assert not bench.lane.stuck
        assert len(bench.tripped) == 3

    asyncio.run(test())


def test_others_that_end_are_progress() -> None:
    async def test() -> None:
        bench = Bench(0.2)
        slow, until = bench.call(), time.monotonic() + 0.8
        while time.monotonic() < until:
            await bench.call(lambda: time.sleep(0.01))
        assert bench.tripped == []
        bench.gate.set()
        assert await slow == "ended"

    asyncio.run(test())


def test_a_deadline_that_is_shortened_holds_for_what_waits_already() -> None:
    async def test() -> None:
        bench = Bench(LONG_S)
        hung = bench.call()
        await asyncio.sleep(0.05)
        bench.lane.wait_for(0.05)
        await asyncio.sleep(0.5)
        assert len(bench.tripped) == 1
        bench.gate.set()
        await hung

    asyncio.run(test())


def test_an_idle_lane_hangs_never() -> None:
    async def test() -> None:
        bench = Bench(0.05)
        await bench.call(lambda: None)
        await asyncio.sleep(0.2)
        assert await bench.call(lambda: 7) == 7
        assert bench.tripped == []

    asyncio.run(test())


def test_what_had_not_begun_when_it_was_closed_is_cancelled() -> None:
    async def test() -> None:
        bench = Bench(LONG_S)
        first, second, third = bench.call(), bench.call(), bench.call()
        await asyncio.sleep(0.05)
        bench.lane.close()
        with pytest.raises(asyncio.CancelledError):
            await third
        bench.gate.set()
        assert [await first, await second] == ["ended", "ended"]

    asyncio.run(test())


def test_a_loop_that_has_ended_is_not_told() -> None:
    bench = Bench(LONG_S)

    async def test() -> None:
        call = bench.call()
        await asyncio.sleep(0.02)
        call.cancel()

    asyncio.run(test())
    bench.gate.set()
    assert bench.lane._threads.submit(lambda: 7).result(10) == 7, "its thread has died"
