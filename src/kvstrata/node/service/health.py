"""How a tier is: asked, only read, or left alone for a while."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvstrata.errors import TierFull
from kvstrata.node.common.backoff import Backoff
from kvstrata.observe.counters import Counters

logger = logging.getLogger(__name__)


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
        self._name = name
        self._counters = counters
        self._when_off = when_off
        self._off = Backoff(clock)
        self._full = Backoff(clock)

    @property
    def off_s(self) -> float:
        """For how long the tier is still left alone; 0: it is asked."""
        return self._off.left_s

    @property
    def full(self) -> bool:
        """Whether it takes no writes for a while, though it can be read."""
        return bool(self._full.left_s)

    def trip(self, error: Exception) -> None:
        """Leave the tier alone for a while: off, or read only when it is merely full."""
        full = isinstance(error, TierFull)
        backoff = self._full if full else self._off
        if backoff.begin():
            self.trouble = str(error)
            self._counters.add("tier_trips_total", tier=self._name)
            what = "takes no writes" if full else "is off"
            logger.error("%s %s for %.0f s: %s", self._name, what, backoff.left_s, error)
            if not full:
                self._when_off()

    def worked(self) -> None:
        """A call did what it should, in time: the next failure is a first one."""
        if not self._off.left_s:
            self._off.worked()

    def wrote(self) -> None:
        """So did a write."""
        self.worked()
        self._full.worked()
