"""Taking out of a shared store what is of no use to anybody, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvstrata.errors import CorruptObject, Incompatible, TierUnavailable
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.turns import Turn, Turns
from kvstrata.parts import identity
from kvstrata.tiers.base import Outcome, SharedTier, Stat
from kvstrata.tiers.marks import Marks


class Weeding:
    """Removes single objects of one shared tier; lives on the node's loop.

    Args:
        tier: the store.
        checked: verifies an object as it is stored, by its id.
        marks: what counts as cleared.
        calls: into the tier.
        turns: of its objects.
        scratch: where an object is looked at.
        trip: is told that the store failed.
    """

    def __init__(
        self,
        tier: SharedTier,
        checked: Callable[[memoryview, bytes], object],
        marks: Marks,
        *,
        calls: TierCalls,
        turns: Turns,
        scratch: Scratch,
        trip: Callable[[Exception], None],
    ) -> None:
        self._tier = tier
        self._checked = checked
        self._marks = marks
        self._calls = calls
        self._turns = turns
        self._scratch = scratch
        self._trip = trip

    async def take_out(self, key: bytes, part: int, name: bytes) -> None:
        """Remove what is corrupt or cleared, or it would stand in the way of a fresh copy for ever.

        If it is: bytes may have been damaged on their way, and others need not lose it for that.
        """
        with self._turns.take([(key, part)]) as turn:
            try:
                await turn.come()
                work = partial(self._useless, name, identity(key, part))
                version = await self._calls.call("check", work, turn.hang)
            except TierUnavailable as error:
                self._trip(error)
                return
            if version is not None:
                await self.take_away(turn, name, version)

    async def take_away(self, turn: Turn, name: bytes, version: str) -> None:
        """Remove an object of this version, or whatever is there if that is empty."""
        try:
            verb = partial(self._tier.delete, [name], [version])
            await self._calls.call("removal", verb, turn.hang)
        except TierUnavailable as error:
            self._trip(error)

    def _useless(self, name: bytes, identity: bytes) -> str | None:
        """The version of what is there, if it is of no use to anybody; blocks."""
        (stat,) = self._tier.stat([name])
        if not isinstance(stat, Stat):
            return None
        with self._scratch.buffer(stat.nbytes) as data:
            (length,) = self._tier.read([name], [data])
            try:
                if not isinstance(length, Outcome):
                    self._checked(data[:length], identity)
                    if self._marks.covers_page(data):
                        return stat.version
            except CorruptObject:
                return stat.version
            except Incompatible:
                pass
        return None
