"""What epoch it is in a shared store, as far as a node may rely on it.

Whoever clears a shared store begins a new epoch there. Every node asks for it again every little
while, and stops using the store where it gets no answer in time; so once that time has passed
nobody uses the old one. The question is also how a store that failed is tried again: alone, and all
else only after it was answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from kvstrata.errors import ReadOnly, TierUnavailable
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.health import Health
from kvstrata.tiers.base import Epoch, SharedTier
from kvstrata.tiers.marks import MAX_IN_EPOCH, Mark, Marks

logger = logging.getLogger(__name__)

RETRY_S = 1.0
ASKS = 4
"""How often a node asks while an epoch lasts: a few answers may be lost or late."""


class Presence:
    """The epoch of one shared tier; lives on the node's loop.

    Args:
        tier: the store.
        calls: into it.
        health: of the tier.
        clock: monotonic seconds.
        when_new: is told that the epoch is another one than before.
        when_marked: is told what was cleared in the present one.
    """

    def __init__(
        self,
        tier: SharedTier,
        calls: TierCalls,
        health: Health,
        clock: Callable[[], float],
        when_new: Callable[[], None],
        when_marked: Callable[[Sequence[Mark]], None],
    ) -> None:
        self.round_s = 0.0
        """What a round trip to the store took lately, at its best."""
        self._tier = tier
        self._calls = calls
        self._health = health
        self._clock = clock
        self._when_new = when_new
        self._when_marked = when_marked
        self._epoch: Epoch | None = None
        self._until = 0.0
        self._to_end = False  # whether a clear of ours has yet to reach the store
        self._to_mark = Marks(most=MAX_IN_EPOCH)  # what was cleared here that it has yet to be told
        self._busy = asyncio.Lock()

    @property
    def number(self) -> int | None:
        """Of the present epoch; None while nobody can rely on one."""
        if self._epoch is None or self._to_end or self._clock() >= self._until:
            return None
        if len(self._to_mark):
            return None
        return self._epoch.number

    @property
    def lasts_s(self) -> float:
        """For how long a node may rely on an epoch after it began to ask."""
        return self._epoch.lasts_s if self._epoch is not None else 0.0

    def lose(self) -> None:
        """The store has failed: rely on nothing until it has answered again."""
        self._until = 0.0

    async def run(self) -> None:
        """Ask again and again."""
        while True:
            await self.ask()
            await asyncio.sleep(self._health.off_s or self.lasts_s / ASKS or RETRY_S)

    async def ask(self) -> None:
        """Ask once; a store that does not answer is left alone for a while."""
        async with self._busy:
            if self._health.off_s:
                return
            begun = self._clock()
            ending, marks = self._to_end, list(self._to_mark)
            try:
                epoch = await self._calls.ask(lambda: self._say(ending, marks))
            except ReadOnly as error:
                what = "this node may not clear it" if ending else "nobody has begun an epoch there"
                self._health.trip(TierUnavailable(f"{what}; start a node that may write: {error}"))
                return
            except TierUnavailable as error:
                self._health.trip(error)
                return
            took = self._clock() - begun
            self.round_s = min(took, 1.2 * self.round_s or took)
            self._to_mark.forget(marks)
            if ending or not self._to_end:  # or else a clear has been asked for meanwhile
                self._take(epoch, begun, ended=ending)

    def _say(self, ending: bool, marks: Sequence[Mark]) -> Epoch:
        """Tell the store of our clears, and ask what epoch it is; blocks."""
        if ending:
            return self._tier.begin_epoch()
        for mark in marks[:-1]:
            self._tier.add_mark(mark)
        return self._tier.add_mark(marks[-1]) if marks else self._tier.epoch()

    async def mark(self, mark: Mark) -> None:
        """Let what a mark covers count as cleared, for all.

        Raises:
            ReadOnly: the store does not let this node.
            TierUnavailable: the store could not be told. It will be, before it is used again here.
        """
        self._to_mark.add(mark)
        async with self._busy:
            marks, begun = list(self._to_mark), self._clock()
            if not marks:
                return  # somebody has told it since
            try:
                epoch = await self._calls.ask(lambda: self._say(False, marks))
            except ReadOnly as error:
                self._to_mark.forget(marks)
                self._health.trip(error)
                raise
            except TierUnavailable as error:
                self._health.trip(error)
                raise
            self._to_mark.forget(marks)
            if not self._to_end:
                self._take(epoch, begun)

    async def end(self) -> Epoch | None:
        """Begin a new epoch, for all; the one that was the present here until now.

        Raises:
            ReadOnly: the store does not let this node; all is as it was.
            TierUnavailable: the store could not be told. It will be, before it is used again here.
        """
        before, pending, self._to_end = self._epoch, self._to_end, True
        async with self._busy:
            begun = self._clock()
            try:
                epoch = await self._calls.ask(self._tier.begin_epoch)
            except ReadOnly as error:
                self._to_end = pending
                self._health.trip(error)
                raise
            except TierUnavailable as error:
                self._health.trip(error)
                raise
            self._take(epoch, begun, ended=True)
        return before

    def _take(self, epoch: Epoch, begun: float, *, ended: bool = False) -> None:
        self._to_end = self._to_end and not ended
        if self._epoch is not None and epoch.number != self._epoch.number:
            logger.info("%s was cleared: epoch %016x", self._tier.name, epoch.number)
            self._when_new()
        self._epoch, self._until = epoch, begun + epoch.lasts_s
        self._when_marked(epoch.marks)
        self._health.worked()
