"""Long work on the node's loop, cut into slices between which others are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Generator
from typing import TypeVar

R = TypeVar("R")

HOLD_S = 0.001
"""How long work goes on before others have their turn; then it ends at its next yield."""


def in_slices(work: Generator[None, None, R]) -> R | Awaitable[R]:
    """Do work that yields wherever others may be served: at once if it takes no longer than a hold.

    Whatever it leaves between two slices others see, and may change.
    """
    try:
        _hold(work)
    except StopIteration as end:
        answer: R = end.value
        return answer
    return _go_on(work)


async def _go_on(work: Generator[None, None, R]) -> R:
    try:
        while True:
            await asyncio.sleep(0)
            _hold(work)
    except StopIteration as end:
        answer: R = end.value
        return answer
    finally:
        work.close()


def _hold(work: Generator[None, None, R]) -> None:
    """Go on for a while; raises StopIteration at the end of the work."""
    stop = time.perf_counter() + HOLD_S
    while True:
        next(work)
        if time.perf_counter() >= stop:
            return
