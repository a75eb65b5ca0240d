"""Calls made at the same time, in threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from kvstrata.errors import TierUnavailable

A = TypeVar("A")


class SideBySide:
    """Threads for calls that wait for a store.

    Args:
        name: of the threads.
        num_threads: calls at once, of all who make some.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, name)

    def run(self, calls: Sequence[Callable[[], A]]) -> list[A]:
        """What they return, once none of them is at work any more; a single one is made here.

        Raises:
            TierUnavailable: the threads are closed.
            Exception: whatever the first of them raised that did.
        """
        if len(calls) == 1:
            return [calls[0]()]
        futures: list[Future[A]] = []
        try:
            for call in calls:
                futures.append(self._pool.submit(call))
        except RuntimeError as error:
            raise TierUnavailable("the tier is closed") from error
        finally:
            wait(futures)
        try:
            return [future.result() for future in futures]
        except CancelledError as error:
            raise TierUnavailable("the tier is closed") from error

    def close(self) -> None:
        """Cancel what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
