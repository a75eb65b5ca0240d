"""How long to leave alone what has failed."""

from __future__ import annotations

import math
from collections.abc import Callable

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0


class Backoff:
    """Leaves something alone for a while, twice as long each time until it works again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = -math.inf
        self._delay_s = FIRST_BACKOFF_S

    @property
    def left_s(self) -> float:
        """For how long still; zero when it may be tried."""
        return max(0.0, self._until - self._clock())

    def begin(self) -> bool:
        """It has failed; False when that is known already."""
        if self.left_s:
            return False
        self._until = self._clock() + self._delay_s
        self._delay_s = min(2 * self._delay_s, LONGEST_BACKOFF_S)
        return True

    def worked(self) -> None:
        """It works; the next failure is a first one."""
        self._delay_s = FIRST_BACKOFF_S
