"""How a tier is: asked, only read, or left alone for a while."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from kvstrata.errors import ReadOnly, TierFull
from kvstrata.node.common.backoff import Backoff
from kvstrata.observe.counters import Counters

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 600.0
"""After so long a tier that this node may only read is written to once more: rights are granted."""


class Health:
    """Of one tier, by what became of the calls into it.

    Args:
        name: of the tier.
        counters: the node's.
        clock: monotonic seconds.
        when_off: is told when the tier is no longer asked.
    """

    def __init__(
        self,
        name: str,
        counters: Counters,
        clock: Callable[[], float],
        when_off: Callable[[], None] = lambda: None,
    ) -> None:
        self.trouble = ""
        self.read_only = ""
        """Why this node may not write to the tier, as far as it has heard; empty: it may."""
        self._name = name
        self._counters = counters
        self._when_off = when_off
        self._off = Backoff(clock)
        self._full = Backoff(clock)
        self._clock = clock
        self._refused_until = -math.inf

    @property
    def off_s(self) -> float:
        """For how long the tier is still left alone; 0: it is asked."""
        return self._off.left_s

    @property
    def full(self) -> bool:
        """Whether it takes no writes for a while, though it can be read."""
        return bool(self._full.left_s) or self._clock() < self._refused_until

    def trip(self, error: Exception) -> None:
        """Leave the tier alone for a while: off, or only read where that works."""
        if isinstance(error, ReadOnly):
            return self._refuse(error)
        full = isinstance(error, TierFull)
        backoff = self._full if full else self._off
        if backoff.begin():
            self.trouble = str(error)
            self._counters.add("tier_trips_total", tier=self._name)
            what = "takes no writes" if full else "is off"
            logger.error("%s %s for %.0f s: %s", self._name, what, backoff.left_s, error)
            if not full:
                self._refused_until = -math.inf  # who it lets write may be another matter then
                self._when_off()

    def worked(self) -> None:
        """A call did what it should, in time: the next failure is a first one."""
        if not self._off.left_s:
            self._off.worked()

    def wrote(self) -> None:
        """So did a write."""
        self.worked()
        self._full.worked()
        if self.read_only:
            self.read_only, self._refused_until = "", -math.inf
            logger.info("%s takes writes again", self._name)

    def _refuse(self, error: ReadOnly) -> None:
        if not self.read_only:
            logger.error("%s is only read from now on: %s", self._name, error)
        self.read_only, self._refused_until = str(error), self._clock() + ASK_AGAIN_S
