"""What a tier brings in a second, measured on the reads that it serves."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable

MEMORY_S = 0.1
"""Of busy time: long enough to be smooth where objects come by the hundred in a second, and short
enough to notice a link that slows down while a load is under way."""


NUM_TIMES = 32
"""Reads of which the shortest says how far away a tier is."""


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
        self._times: deque[float] = deque(maxlen=NUM_TIMES)
        self._brought_at = -math.inf

    @property
    def shortest_s(self) -> float:
        """What the shortest of the last reads took; 0 before the first."""
        return min(tuple(self._times), default=0.0)

    @property
    def age_s(self) -> float:
        """How long ago a read brought something; `inf` before the first."""
        return self._clock() - self._brought_at

    def looked(self) -> None:
        """Somebody looks: others need not for a while, whatever he brings."""
        self._brought_at = self._clock()

    def took(self, seconds: float) -> None:
        """One read that brought something took so long, by itself."""
        self._times.append(seconds)
        self._brought_at = self._clock()

    def begin(self) -> None:
        """A read begins."""
        with self._lock:
            if not self._reading:
                self._since = self._clock()
            self._reading += 1

    def end(self, nbytes: int) -> None:
        """A read has ended, and has brought so much: nothing, if it failed."""
        with self._lock:
            self._reading -= 1
            now = self._clock()
            seconds = now - self._since
            self._bytes, self._seconds = self._faded(seconds)
            # It came all the while, and the older part of it counts less.
            share = MEMORY_S * -math.expm1(-seconds / MEMORY_S) / seconds if seconds else 1.0
            self._bytes += nbytes * share
            self._since = now

    @property
    def bytes_per_s(self) -> float | None:
        """The estimate, or None while nothing was read. A read that does not end lowers it."""
        with self._lock:
            waiting = self._clock() - self._since if self._reading else 0.0
            brought, seconds = self._faded(waiting)
            return brought / max(seconds, 1e-9) if brought else None

    def _faded(self, seconds: float) -> tuple[float, float]:
        """Bytes and seconds, each weighted by its age, after so much more busy time."""
        kept = math.exp(-seconds / MEMORY_S)
        return self._bytes * kept, self._seconds * kept + MEMORY_S * (1 - kept)
