"""A clock that only moves when a test says so."""

from __future__ import annotations

from kvstrata.errors import UsageError


class ManualClock:
    """Seconds as a float, like `time.monotonic`; stands still between calls of `advance`."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward.

        Raises:
            UsageError: `seconds` is negative; clocks of this kind never go back.
        """
        if seconds < 0:
            raise UsageError(f"a monotonic clock cannot go back by {-seconds} s")
        self._now_s += seconds
