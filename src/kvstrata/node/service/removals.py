"""Objects that are out of a tier's index but still in the tier: their bytes count until they go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.node.common.index import Index
from kvstrata.node.service.calls import TierCalls
from kvstrata.parts import identity
from kvstrata.tiers.base import Outcome

# An entry is the object's size plus the number of its byte order, 0 while unknown: sizes are
# multiples of 4096, so there is room for it.
ORDER_MASK = 4095


class Removals:
    """What is to be deleted from one tier at the next chance; lives on the node's loop.

    Args:
        index: of the tier.
        calls: into the tier.
        trip: is told why something could not be deleted.
    """

    def __init__(
        self, index: Index[int], calls: TierCalls, trip: Callable[[TierUnavailable], None]
    ) -> None:
        self._index = index
        self._calls = calls
        self._trip = trip
        self._doomed: dict[tuple[bytes, int], int] = {}

    def __len__(self) -> int:
        return len(self._doomed)

    def __contains__(self, name: tuple[bytes, int]) -> bool:
        return name in self._doomed

    def add(self, key: bytes, part: int, nbytes: int) -> None:
        """Delete an object that is not in the index; its bytes are claimed already."""
        self._doomed[key, part] = self._doomed.get((key, part), 0) + nbytes

    def condemn(self, key: bytes, part: int) -> None:
        """Take an object out of the index and delete it."""
        entry = self._index.pop(key, part)
        if entry is not None:
            self._index.claim_existing(entry & ~ORDER_MASK)
            self.add(key, part, entry & ~ORDER_MASK)

    def condemn_chunk(self, key: bytes) -> int:
        """Do so with all objects of a chunk; how many."""
        parts = [part for part, _ in self._index.objects(key)]
        for part in parts:
            self.condemn(key, part)
        return len(parts)

    def replaced(self, key: bytes, part: int) -> None:
        """A new object has taken the place of what was here under its name."""
        self._index.unclaim(self._doomed.pop((key, part), 0))

    async def run(
        self,
        verb: Callable[[Sequence[bytes]], list[Outcome]],
        only: tuple[bytes, int] | None = None,
    ) -> bool:
        """Delete all of it, or one object; what cannot be deleted stays.

        Args:
            verb: of the tier.
            only: the key and part of the one.
        Returns:
            Whether all of it has gone.
        """
        if only is None:
            batch, self._doomed = self._doomed, {}
        else:
            batch = {only: self._doomed.pop(only, 0)}
        if not batch:
            return True
        names = [identity(key, part) for key, part in batch]
        error: TierUnavailable | None = None
        try:
            outcomes = await self._calls.call(lambda: verb(names))
        except TierUnavailable as failure:
            error, outcomes = failure, [Outcome.FAILED] * len(batch)
        for ((key, part), nbytes), outcome in zip(batch.items(), outcomes, strict=True):
            if outcome is not Outcome.FAILED:
                self._index.unclaim(nbytes)
                continue
            self.add(key, part, nbytes)
            error = error or TierFull("objects cannot be deleted")
        if error is not None:
            self._trip(error)
        return error is None
