"""Calls into a tier, in threads of its own: one that hangs loses those and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from kvstrata.errors import CorruptObject, Incompatible, TierUnavailable, UsageError
from kvstrata.node.common.background import Threads, report_bug
from kvstrata.observe.counters import Counters

R = TypeVar("R")

GRACE_S = 0.2


class TierCalls:
    """The threads of one tier, and how long the node waits for them.

    Args:
        name: of the tier.
        num_threads: threads for reads, and as many for all else.
        deadline_s: a tier that completes no read for this long is taken as hung.
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
        self._deadline_s = deadline_s
        self._counters = counters
        self._clock = clock
        self._trip = trip
        self._readers = Threads(num_threads, f"kvstrata-{name}-read")
        self._writers = Threads(num_threads, f"kvstrata-{name}-write")
        self._num_reading = 0
        self._num_ended = 0
        self._last_progress = clock()

    async def read(self, work: Callable[[], R], give_up: Callable[[], None]) -> R:
        """Run a read, as long as reads still come to their end.

        Returns only when no thread runs ``work`` any more; ``give_up`` is called before, when the
        deadline passes.

        Raises:
            TierUnavailable: the tier said so, hangs, or raised what it should not.
            CorruptObject, Incompatible, UsageError: from ``work``.
        """
        try:
            call = self._readers.submit(work)
        except RuntimeError as error:  # no thread can be started
            raise self._bug(error) from error
        future = asyncio.wrap_future(call)
        if not self._num_reading:
            self._last_progress = self._clock()
        self._num_reading += 1
        try:
            hung = not await self._ends_or_others_do(future)
        finally:
            self._num_reading -= 1
        if hung:
            trouble = TierUnavailable(f"no read has ended for {self._deadline_s:g} s")
            self._trip(trouble)
            give_up()
            if call.cancel():
                raise trouble
            await asyncio.wait({future})
        self._last_progress = self._clock()
        self._num_ended += 1
        try:
            return future.result()
        except (TierUnavailable, CorruptObject, Incompatible, UsageError):
            raise
        except Exception as failure:
            raise self._bug(failure) from failure

    async def _ends_or_others_do(self, future: asyncio.Future[R]) -> bool:
        """Wait for a read; False once no read at all has ended for as long as the deadline."""
        while not future.done():
            left = self._last_progress + self._deadline_s - self._clock()
            if left > 0:
                await asyncio.wait({future}, timeout=left)
                continue
            # Time passes for a stopped process, too: let its threads come to their end first.
            before = self._num_ended
            await asyncio.wait({future}, timeout=GRACE_S)
            if not future.done() and self._num_ended == before:
                return False
        return True

    async def call(self, work: Callable[[], R]) -> R:
        """Run any other call of the tier, in a writer's thread.

        Raises:
            TierUnavailable: the tier said so, or raised what it should not.
        """
        try:
            return await asyncio.wrap_future(self.submit(work))
        except TierUnavailable:
            raise
        except Exception as error:
            raise self._bug(error) from error

    def submit(self, work: Callable[[], R]) -> Future[R]:
        """Run something in a writer's thread; what it raises is the caller's to judge."""
        return self._writers.submit(work)

    def close(self) -> None:
        """Cancel what has not begun; threads that hang are left behind."""
        self._readers.close()
        self._writers.close()

    def _bug(self, error: Exception) -> TierUnavailable:
        """What a tier should not have raised makes it unavailable, like what it may."""
        report_bug(self._counters, f"tier {self._name}", error)
        return TierUnavailable(f"{type(error).__name__}: {error}")
