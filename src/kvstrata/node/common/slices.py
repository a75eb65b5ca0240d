"""Long work on the node's loop, cut into slices between which others are served.

Work is a generator. It yields None where others may be served, or what has to be waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Generator
from typing import Any, TypeAlias, TypeVar

R = TypeVar("R")

Work: TypeAlias = Generator[Awaitable[Any] | None, None, R]

HOLD_S = 0.0005
"""How long work goes on before others have their turn; then it ends at its next yield."""


def in_slices(work: Work[R]) -> R | Awaitable[R]:
    """Do work: at once if it takes no longer than a hold and waits for nothing.

    Whatever it leaves between two slices others see, and may change.
    """
    try:
        first = _hold(work)
    except StopIteration as end:
        answer: R = end.value
        return answer
    return _go_on(work, first)


async def _go_on(work: Work[R], awaited: Awaitable[Any] | None) -> R:
    try:
        while True:
            await (asyncio.sleep(0) if awaited is None else awaited)
            awaited = _hold(work)
    except StopIteration as end:
        answer: R = end.value
        return answer
    finally:
        work.close()


def at_once(work: Work[R]) -> R:
    """Do work that is short, and waits for nothing, without a pause."""
    try:
        while True:
            next(work)
    except StopIteration as end:
        answer: R = end.value
        return answer


def _hold(work: Work[R]) -> Awaitable[Any] | None:
    """Go on for a while, or until something must be waited for: this.

    Raises StopIteration at the end of the work.
    """
    stop = time.perf_counter() + HOLD_S
    while True:
        awaited = next(work)
        if awaited is not None or time.perf_counter() >= stop:
            return awaited
