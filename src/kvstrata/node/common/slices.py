"""Long work on the node's loop, cut into slices between which others are served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import TypeVar

R = TypeVar("R")


def in_slices(work: Generator[None, None, R]) -> R | Awaitable[R]:
    """Do work that yields wherever others may be served: at once if it never does.

    Whatever it leaves between two slices others see, and may change.
    """
    try:
        next(work)
    except StopIteration as end:
        answer: R = end.value
        return answer
    return _go_on(work)


async def _go_on(work: Generator[None, None, R]) -> R:
    try:
        while True:
            await asyncio.sleep(0)
            next(work)
    except StopIteration as end:
        answer: R = end.value
        return answer
    finally:
        work.close()
