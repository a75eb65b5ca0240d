"""Buffers for objects on their way through a codec."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Scratch:
    """Buffers aligned for direct I/O, used again: faulting fresh memory in costs more than a copy.

    There are never more of them than were in use at once, and none is kept for long unused.

    Args:
        num_kept: buffers to keep for the next use.
    """

    def __init__(self, num_kept: int) -> None:
        self.nbytes = 0
        self._num_kept = num_kept
        self._kept: list[mmap.mmap] = []
        self._num_idle = 0  # of those kept, which nobody took since `trim`
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> mmap.mmap:
        """A buffer of at least ``nbytes``; holds anything."""
        with self._lock:
            for i, buffer in enumerate(self._kept):
                if len(buffer) >= nbytes:
                    self._kept.pop(i)
                    self._num_idle = min(self._num_idle, len(self._kept))
                    return buffer
        buffer = mmap.mmap(-1, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        with self._lock:
            self.nbytes += len(buffer)
        return buffer

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
            self._drop(len(self._kept) - self._num_kept)

    def trim(self) -> None:
        """Let go of as many buffers as nobody has needed since the last time."""
        with self._lock:
            self._drop(self._num_idle)
            self._num_idle = len(self._kept)

    def _drop(self, count: int) -> None:
        for buffer in self._kept[: max(0, count)]:
            self.nbytes -= len(buffer)
        del self._kept[: max(0, count)]
