"""What time it is for a node: its machine's clock says, or its fleet's registry where there is one.

Dates of what is stored, and times of what is cleared, are held against each other by all nodes, and
the clocks of their machines differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class WallClock:
    """Nanoseconds since 1970, by the registry's clock once that was heard.

    From then on it goes by the machine's monotonic clock, so nobody who sets the machine's time
    moves it.

    Args:
        wall_ns: of the machine, since 1970.
        monotonic_ns: of the machine, since some moment.
    """

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall_ns = wall_ns
        self._monotonic_ns = monotonic_ns
        self._begin_ns: int | None = None  # the registry's time at that moment

    def __call__(self) -> int:
        if self._begin_ns is None:
            return self._wall_ns()
        return self._begin_ns + self._monotonic_ns()

    def heard(self, now_s: float, at_s: float) -> None:
        """The registry's clock said ``now_s`` when the monotonic one stood at ``at_s``, seconds."""
        self._begin_ns = int((now_s - at_s) * 1e9)
