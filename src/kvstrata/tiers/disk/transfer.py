"""Whole buffers in a row to and from a file, however little of it the system moves at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvstrata.tiers.disk.scan import PAGE

Call: TypeAlias = Callable[[int, Sequence[memoryview], int], int]
"""`os.preadv` or `os.pwritev`."""


def transfer(call: Call, fd: int, buffers: Sequence[memoryview]) -> int:
    """Move whole buffers from or to the start of a file; returns the bytes moved."""
    total, done = sum(map(len, buffers)), 0
    while done < total:
        num = call(fd, _behind(buffers, done), done)
        # O_DIRECT goes on at a page only; a part of a page is done again.
        ahead = done + num if done + num == total else (done + num) // PAGE * PAGE
        if ahead <= done:
            break
        done = ahead
    return done


def _behind(buffers: Sequence[memoryview], start: int) -> list[memoryview]:
    """What is left of buffers in a row behind their first ``start`` bytes."""
    left = []
    for buffer in buffers:
        if start < len(buffer):
            left.append(buffer[start:])
        start = max(0, start - len(buffer))
    return left
