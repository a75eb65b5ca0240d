"""Calls into a tier, in threads of its own: one that hangs loses those and nothing else.

Every call has a deadline, and it counts progress: a tier hangs when no call of a kind has ended for
that long, however many wait. What a hung call holds stays held until its thread has come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from kvstrata.errors import CorruptObject, Incompatible, TierUnavailable, UsageError
from kvstrata.node.common.background import NICE, Threads, report_bug
from kvstrata.observe.counters import Counters

R = TypeVar("R")

GRACE_S = 0.2
ENCODE_DEADLINE_S = 60.0
"""At least, for a codec: its first object may have to wait for a compiler."""
ASK_THREADS = 4
ENCODE_NICE = 10
"""Encoding is work for the processor, not for a device: it takes what engines leave."""


def half_the_cores() -> int:
    """Of those that this process may use; what computes leaves the others to engines."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def nothing() -> None:
    """What is to be done where nobody waits."""


def _settle(ended: asyncio.Future[bool], how: bool) -> None:
    if not ended.done():
        ended.set_result(how)


class Timed(Generic[R]):
    """A call that knows what it took in its thread."""

    def __init__(self, work: Callable[[], R]) -> None:
        self.seconds: float | None = None
        self._work = work

    def __call__(self) -> R:
        begun = time.perf_counter()
        try:
            return self._work()
        finally:
            self.seconds = time.perf_counter() - begun


class Lane:
    """Threads for calls of one kind, and how long the node waits for one of them to end.

    Args:
        name: of the threads.
        num_threads: calls at once.
        nice: how much they yield to other threads.
        deadline_s: without a call that ends for this long, those that wait are given up.
        clock: monotonic seconds.
        trip: is told that the tier hangs.
    """

    def __init__(
        self,
        name: str,
        num_threads: int,
        nice: int,
        deadline_s: float,
        clock: Callable[[], float],
        trip: Callable[[TierUnavailable], None],
    ) -> None:
        self.num_threads = num_threads
        self._threads = Threads(num_threads, name, nice)
        self.deadline_s = deadline_s
        self._clock = clock
        self._trip = trip
        self._waiting: set[asyncio.Future[bool]] = set()  # true: it ended; false: it hangs
        self._watching: asyncio.TimerHandle | None = None
        self._num_stuck = 0
        self._num_ended = 0
        self._last_progress = clock()

    @property
    def num_under_way(self) -> int:
        """Calls that wait for a thread, or run and were not given up."""
        return len(self._waiting)

    @property
    def stuck(self) -> bool:
        """Whether every thread is in a call that was given up."""
        return self._num_stuck >= self.num_threads

    async def run(
        self, what: str, work: Callable[[], R], give_up: Callable[[], None] = nothing
    ) -> R:
        """Run ``work``, as long as calls still come to their end; what it raises passes through.

        Returns only when no thread runs it any more; ``give_up`` is called before, when the
        deadline passes.

        Raises:
            TierUnavailable: it was given up and will not run.
            RuntimeError: there is no thread for it.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bool] = loop.create_future()
        call = self._threads.submit(work)
        call.add_done_callback(lambda _: self._tell(loop, ended))
        if not self._waiting:
            self._last_progress = self._clock()
        self._waiting.add(ended)
        self._watch(loop)
        try:
            hung = not await ended
        finally:
            self._waiting.discard(ended)
        if hung:
            trouble = TierUnavailable(f"no {what} has ended for {self.deadline_s:g} s")
            cancelled = call.cancel()
            self._num_stuck += not cancelled
            self._trip(trouble)
            give_up()
            if cancelled:
                raise trouble
            try:
                await asyncio.wait({asyncio.wrap_future(call)})
            finally:
                self._num_stuck -= 1
        self._last_progress = self._clock()
        self._num_ended += 1
        if call.cancelled():  # the lane was closed
            raise asyncio.CancelledError
        return call.result()

    def wait_for(self, deadline_s: float) -> None:
        """Wait so long from now on."""
        self.deadline_s = deadline_s
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
            self._watch(asyncio.get_running_loop())

    def close(self) -> None:
        """Cancel what has not begun."""
        self._threads.close()

    @staticmethod
    def _tell(loop: asyncio.AbstractEventLoop, ended: asyncio.Future[bool]) -> None:
        """A call has come to its end, in its thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            loop.call_soon_threadsafe(_settle, ended, True)

    def _watch(self, loop: asyncio.AbstractEventLoop, grace: int | None = None) -> None:
        """Look again when those that wait may have waited in vain.

        Args:
            grace: how many calls had ended when the deadline had passed; None: it has not.
        """
        if self._watching is None and self._waiting:
            left = self._last_progress + self.deadline_s - self._clock()
            after = left if grace is None else GRACE_S
            self._watching = loop.call_later(after, self._look, loop, grace)

    def _look(self, loop: asyncio.AbstractEventLoop, grace: int | None) -> None:
        self._watching = None
        if self._last_progress + self.deadline_s > self._clock():
            self._watch(loop)
        elif grace != self._num_ended:
            # Time passes for a stopped process, too: let its threads come to their end first.
            self._watch(loop, self._num_ended)
        else:
            for ended in self._waiting:
                _settle(ended, False)


class TierCalls:
    """The lanes of one tier: reads and questions that somebody waits for, all else, and encoding.

    Args:
        name: of the tier.
        num_threads: threads of each lane; for encoding, half as many as there are cores at most.
        deadline_s: a lane in which no call ends for this long is taken as hung.
        counters: the node's.
        clock: monotonic seconds.
        trip: is told that the tier hangs.
    """

    def __init__(
        self,
        name: str,
        num_threads: int,
        deadline_s: float,
        *,
        counters: Counters,
        clock: Callable[[], float],
        trip: Callable[[TierUnavailable], None],
    ) -> None:
        self._name = name
        self._counters = counters

        def lane(kind: str, num_threads: int, nice: int, deadline_s: float) -> Lane:
            name = f"kvstrata-{self._name}-{kind}"
            return Lane(name, num_threads, nice, deadline_s, clock, trip)

        patient_s = max(deadline_s, ENCODE_DEADLINE_S)
        self._reads = lane("read", num_threads, 0, deadline_s)
        self._questions = lane("ask", ASK_THREADS, 0, deadline_s)
        self._others = lane("write", num_threads, NICE, deadline_s)
        self._encodes = lane("encode", min(num_threads, half_the_cores()), ENCODE_NICE, patient_s)

    def wait_for(self, deadline_s: float) -> None:
        """Take a lane in which no call ends for this long as hung, from now on."""
        for lane in (self._reads, self._questions, self._others):
            lane.wait_for(deadline_s)
        self._encodes.wait_for(max(deadline_s, ENCODE_DEADLINE_S))

    @property
    def stuck(self) -> bool:
        """Whether nothing can be written, since all threads for it hang."""
        return self._others.stuck or self._encodes.stuck

    async def read(self, work: Callable[[], R], give_up: Callable[[], None] = nothing) -> R:
        """Run a read that somebody waits for; see `Lane.run`.

        Raises:
            TierUnavailable: the tier said so, hangs, or raised what it should not.
            CorruptObject, Incompatible, UsageError: from ``work``.
        """
        return await self._run(self._reads, "read", work, give_up)

    async def ask(self, work: Callable[[], R]) -> R:
        """Run a short question that somebody waits for, past all that is being read; as `read`."""
        return await self._run(self._questions, "answer", work, nothing)

    async def call(
        self, what: str, work: Callable[[], R], give_up: Callable[[], None] = nothing
    ) -> R:
        """Run any other call of the tier, in a thread that yields to engines; as `read`.

        Args:
            what: it does, in a word.
            work: the call.
            give_up: see `Lane.run`.
        """
        return await self._run(self._others, what, work, give_up)

    async def encode(self, work: Callable[[], R], give_up: Callable[[], None] = nothing) -> R:
        """Run a codec, likewise; what it raises is the caller's to judge."""
        return await self._timed(self._encodes, "encoding", work, give_up)

    def under_way(self) -> dict[str, int]:
        """Calls that wait or run, by lane."""
        lanes = {"read": self._reads, "ask": self._questions, "write": self._others}
        return {
            name: lane.num_under_way for name, lane in {**lanes, "encode": self._encodes}.items()
        }

    def close(self) -> None:
        """Cancel what has not begun; threads that hang are left behind."""
        for lane in (self._reads, self._questions, self._others, self._encodes):
            lane.close()

    async def _run(
        self, lane: Lane, what: str, work: Callable[[], R], give_up: Callable[[], None]
    ) -> R:
        try:
            return await self._timed(lane, what, work, give_up)
        except (TierUnavailable, CorruptObject, Incompatible, UsageError):
            raise
        except Exception as error:
            # What a tier should not have raised makes it unavailable, like what it may.
            report_bug(self._counters, f"tier {self._name}", error)
            raise TierUnavailable(f"{type(error).__name__}: {error}") from error

    async def _timed(
        self, lane: Lane, what: str, work: Callable[[], R], give_up: Callable[[], None]
    ) -> R:
        call = Timed(work)
        try:
            return await lane.run(what, call, give_up)
        finally:
            if call.seconds is not None:
                self._counters.observe(
                    "tier_call_seconds", call.seconds, tier=self._name, call=what
                )
