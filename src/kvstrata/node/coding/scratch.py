"""Buffers for objects on their way through a codec."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Scratch:
    """Buffers aligned for direct I/O, used again: faulting fresh memory in costs more than a copy.

    Args:
        num_kept: buffers to keep for the next use.
    """

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._kept: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> mmap.mmap:
        """A buffer of at least ``nbytes``; holds anything."""
        with self._lock:
            for i, buffer in enumerate(self._kept):
                if len(buffer) >= nbytes:
                    return self._kept.pop(i)
        return mmap.mmap(-1, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)

    @contextmanager
    def buffer(self, nbytes: int) -> Iterator[memoryview]:
        """Exactly ``nbytes`` for the time of a ``with``."""
        buffer = self.take(nbytes)
        try:
            yield memoryview(buffer)[:nbytes]
        finally:
            self.give(buffer)

    def give(self, buffer: mmap.mmap) -> None:
        """Give one back that nobody reads or writes any more."""
        with self._lock:
            self._kept.append(buffer)
            self._kept.sort(key=len)
            # The small ones go first: they are what the next object may not fit into.
            del self._kept[: -self._num_kept]
