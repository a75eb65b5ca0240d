"""What SGLang's own metrics show of a storage: how many pages an operation had, and how fast."""

from __future__ import annotations

import threading
from typing import Any

MAX_VALUES = 1024
"""Operations between two collections; what is more is not entered."""


class Tally:
    """Counts of loads and stores, in whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, list[float]] = {}

    def note(self, what: str, pages: int, nbytes: int, seconds: float) -> None:
        """Enter an operation: ``prefetch`` or ``backup``."""
        if not pages:
            return
        with self._lock:
            counts = self._values.setdefault(f"{what}_pgs", [])
            rates = self._values.setdefault(f"{what}_bandwidth", [])
            if len(counts) < MAX_VALUES:
                counts.append(pages)
                rates.append(nbytes / max(seconds, 1e-9) / 1e9)

    def take(self) -> Any:
        """SGLang's ``StorageMetrics`` of what was noted since the last time; GB a second."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._lock:
            values, self._values = self._values, {}
        return StorageMetrics(**values)
