"""What a clear is: chunks that nobody finds any more, in any tier, whatever is in motion.

A chunk leaves all tiers in one step, so that nobody finds it in one after it has left another. Many
chunks leave in slices, between which others are served; everything leaves at once, and only its
bytes are given back in slices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable

from kvstrata.errors import ReadOnly, TierUnavailable
from kvstrata.node.common.changes import Cause
from kvstrata.node.operating.operations import Operations
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.movement import Movement
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.reservations import ReservationTable
from kvstrata.wire import protocol as p

SLICE = 8


class Clearer:
    """Clears tiers by name; "host" is host memory.

    Args:
        host: host memory.
        reservations: what is being written to it.
        movement: what is on its way between it and the slower tiers.
        operations: what jobs have on its way.
        backings: the slower tiers.
    """

    def __init__(
        self,
        host: HostMemory,
        reservations: ReservationTable,
        movement: Movement,
        operations: Operations,
        backings: Iterable[Backing],
    ) -> None:
        self._host = host
        self._reservations = reservations
        self._movement = movement
        self._operations = operations
        self._backings = backings

    def clear(self, tiers: set[str]) -> Awaitable[int]:
        """Forget everything in these tiers, now; the answer, once they have: how many objects.

        Awaiting it raises:
            TierUnavailable: a tier serves nothing of it any more, but could not delete it.
        """
        self._forget_motion(None)
        count = self._host.clear() if "host" in tiers else 0
        return self._finish_clear(count, [b.clear() for b in self._backings if b.name in tiers])

    def drop(self, packed: bytes, tiers: set[str]) -> Awaitable[int]:
        """The same with the chunks of these keys; of many, the first few now, the others soon."""
        p.count(packed, 32)
        return self._finish_drop(packed, tiers, *self._drop_slice(packed, 0, tiers))

    async def _finish_clear(self, count: int, backings: list[Awaitable[int]]) -> int:
        while self._host.give_back(SLICE):
            await asyncio.sleep(0)
        return count + await _total(backings)

    async def _finish_drop(
        self, packed: bytes, tiers: set[str], count: int, backings: list[Awaitable[int]]
    ) -> int:
        for start in range(SLICE, len(packed) // 32, SLICE):
            await asyncio.sleep(0)
            more, removals = self._drop_slice(packed, start, tiers)
            count += more
            backings += removals
        return count + await _total(backings)

    def _drop_slice(
        self, packed: bytes, start: int, tiers: set[str]
    ) -> tuple[int, list[Awaitable[int]]]:
        keys = set(p.split(packed[32 * start : 32 * (start + SLICE)], 32))
        self._forget_motion(keys)
        count = sum(self._host.drop(key, Cause.CLEARED) for key in keys) if "host" in tiers else 0
        # Each begins to delete at once: what is out of the index must not pile up.
        drops = [asyncio.ensure_future(b.drop(keys)) for b in self._backings if b.name in tiers]
        return count, [*drops]

    def _forget_motion(self, keys: set[bytes] | None) -> None:
        self._movement.forget(keys)
        self._reservations.forget(keys)
        self._operations.forget(keys)


async def _total(counts: list[Awaitable[int]]) -> int:
    """The sum of what they answer, once all of them have; or the first failure."""
    total = 0
    failure: TierUnavailable | None = None
    for answer in counts:  # which are under way side by side
        try:
            total += await answer
        except TierUnavailable as error:
            # Of what is merely not allowed nothing is left half done.
            failure = error if failure is None or isinstance(failure, ReadOnly) else failure
    if failure is not None:
        raise failure
    return total
