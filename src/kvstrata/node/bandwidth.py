"""What a tier brings in a second, measured on the reads that it serves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

KEPT = 0.5
"""Weight of the past at each read: about the last two count, so that a link that slows down is
noticed while a load is under way."""


class Bandwidth:
    """Bytes per second of a tier while at least one read is under way; for all its threads.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._reading = 0
        self._since = 0.0  # counted up to here, while a read is under way
        self._bytes = 0.0
        self._seconds = 0.0

    @contextmanager
    def read(self, nbytes: int) -> Iterator[None]:
        """Count a read, which runs in the ``with``; one that fails has brought nothing."""
        with self._lock:
            if not self._reading:
                self._since = self._clock()
            self._reading += 1
        brought = 0
        try:
            yield
            brought = nbytes
        finally:
            with self._lock:
                self._reading -= 1
                now = self._clock()
                self._bytes = KEPT * self._bytes + brought
                self._seconds = KEPT * self._seconds + now - self._since
                self._since = now

    @property
    def bytes_per_s(self) -> float | None:
        """The estimate, or None while nothing was read. A read that does not end lowers it."""
        with self._lock:
            if not self._bytes:
                return None
            waiting = self._clock() - self._since if self._reading else 0.0
            return self._bytes / max(self._seconds + waiting, 1e-9)
