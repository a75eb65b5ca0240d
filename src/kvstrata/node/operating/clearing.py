"""What a clear is: chunks that nobody finds any more, in any tier, whatever is in motion.

What is cleared by whose it is, or how old, goes by a mark: what the node knows of goes, and the
tiers keep the mark against all that nobody knows of yet.

A chunk leaves all tiers in one step, so that nobody finds it in one after it has left another. Many
chunks leave in slices, between which others are served; everything leaves at once, and only its
bytes are given back in slices.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from kvstrata.errors import ReadOnly, TierUnavailable, UsageError
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.slices import Work, in_slices
from kvstrata.node.operating.operations import Operations
from kvstrata.node.operating.pinning import Pinning
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.ledger import Keeping, Marked
from kvstrata.node.service.movement import Movement
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.reservations import ReservationTable
from kvstrata.tiers.marks import MARGIN_NS, UNKNOWN, Mark
from kvstrata.wire import protocol as p

logger = logging.getLogger(__name__)

SLICE = 8
STRIKE_SLICE = 16
COVERED_SLICE = 64


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
        backings: Sequence[Backing],
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

    def covered(self, packed: bytes, mark: Mark) -> Work[bytes]:
        """Of these keys, all but those of chunks that are known not to be covered."""
        covered = bytearray()
        for number in range(p.count(packed, 32)):
            key = packed[32 * number : 32 * (number + 1)]
            if self._may_be_covered(key, mark):
                covered += key
            if number % COVERED_SLICE == COVERED_SLICE - 1:
                yield None
        return bytes(covered)

    def drop(self, packed: bytes, tiers: set[str]) -> Awaitable[int]:
        """The same with the chunks of these keys; of many, the first few now, the others soon."""
        p.count(packed, 32)
        return self._finish_drop(packed, tiers, *self._drop_slice(packed, 0, tiers))

    def _may_be_covered(self, key: bytes, mark: Mark) -> bool:
        indexes = [b.index for b in self._backings if isinstance(b, OwnedBacking)]
        for whose in (self._host.index.whose(key), *(index.whose(key) for index in indexes)):
            if whose != UNKNOWN and not mark.fits(whose):
                return False
        dates = [self._host.created_ns(slot) for _, slot in self._host.index.objects(key)]
        return not dates or min(dates) < mark.before_ns + MARGIN_NS

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

    def mark(self, mark: Mark, tiers: set[str], *, aged: bool) -> Awaitable[int]:
        """The same with all that a mark covers; from when it is done, nobody is served any of it.

        Args:
            mark: what is to be forgotten.
            tiers: where.
            aged: whether some of what is here may be younger than what it covers.
        """
        self._reservations.forget_marked(mark, aged=aged)
        here = self._host.index.owners.may_have(mark)
        named = [
            b
            for b in self._backings
            if b.name in tiers and (here or not (isinstance(b, OwnedBacking) and b.lacks(mark)))
        ]
        own = [b for b in named if isinstance(b, OwnedBacking)]
        for backing in own:
            backing.num_marking += 1
        backings = [asyncio.ensure_future(b.mark(mark, aged=aged)) for b in named]
        host = in_slices(self._strike_host(mark, aged)) if "host" in tiers else 0
        return asyncio.ensure_future(self._finish_mark(host, backings, own))

    async def _finish_mark(
        self,
        host: Awaitable[int] | int,
        backings: Sequence[Awaitable[int]],
        own: list[OwnedBacking],
    ) -> int:
        try:
            count = host if isinstance(host, int) else await host
            return count + await _total(backings)
        finally:
            for backing in own:
                backing.num_marking -= 1

    def _strike_host(self, mark: Mark, aged: bool) -> Work[int]:
        index, count = self._host.index, 0
        for number, key in enumerate(list(index.keys()), 1):
            if number % STRIKE_SLICE == 0:
                yield None
            whose = index.whose(key)
            if mark.fits(whose) and (
                not aged
                or any(
                    mark.covers(whose, self._host.created_ns(slot))
                    for _, slot in index.objects(key)
                )
            ):
                count += self._host.drop(key, Cause.CLEARED)
        return count

    def _forget_motion(self, keys: set[bytes] | None) -> None:
        self._movement.forget(keys)
        self._reservations.forget(keys)
        self._operations.forget(keys)


async def _total(counts: Sequence[Awaitable[int]]) -> int:
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


class Clearing:
    """What an operator asks to be cleared, in any combination.

    Args:
        clearer: does it.
        pinning: whose pins end with it.
        backings: the slower tiers.
        keeping: where the marks of tiers are that are not the node's own, and may not be told.
        wall: nanoseconds since 1970, by the clock that dates go by.
    """

    def __init__(
        self,
        clearer: Clearer,
        pinning: Pinning,
        backings: Sequence[Backing],
        keeping: Keeping,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._wall = wall
        self._clearer = clearer
        self._pinning = pinning
        self._backings = backings
        self._keeping = keeping
        self._others = [one for one in backings if not isinstance(one, OwnedBacking)]
        marks = list(keeping.ledger.marks)
        if keeping.ledger.damaged:
            logger.error(
                "the node's journal is damaged, so nobody knows what was cleared: what was stored "
                "so far in tiers that others write to counts as that"
            )
            marks.append(Mark(b"", b"", wall()))
        for backing in self._others:
            for mark in marks:
                backing.marks.add(mark)
        self._names = {"host", *(one.name for one in backings)}
        self._own = {"host", *(one.name for one in backings if isinstance(one, OwnedBacking))}

    def clear(self, message: p.Clear) -> Awaitable[p.Reply]:
        """Clear, now; the answer, once it is done: how many objects have gone that were known.

        Raises:
            UsageError: it asks for what cannot be.

        Awaiting it raises:
            TierUnavailable: a tier serves nothing of it any more, but a later process may.
        """
        mark = self._mark_of(message)
        if message.keys is not None and mark is not None:
            covered = in_slices(self._clearer.covered(message.keys, mark))
            if not isinstance(covered, bytes):
                return self._clear_later(message, mark, covered)
            message = msgspec.structs.replace(message, keys=covered)
        return self._finish(message, self._begin(message, mark))

    async def _clear_later(
        self, message: p.Clear, mark: Mark, covered: Awaitable[bytes]
    ) -> p.Reply:
        message = msgspec.structs.replace(message, keys=await covered)
        return await self._finish(message, self._begin(message, mark))

    async def _finish(self, message: p.Clear, cleared: Awaitable[int]) -> p.Reply:
        ended = False
        # Of a pin nobody knows what namespace or age the chunks have that are not here.
        if set(message.tiers or self._own) >= self._own and not (
            message.namespace or message.before_ns
        ):
            keys = None if message.keys is None else p.split(message.keys, 32)
            ended = await self._pinning.cleared(keys, message.owner)
        saving = asyncio.ensure_future(self._keeping.save(asyncio.to_thread))
        try:
            count = await cleared
            await saving
        finally:
            await asyncio.wait([saving])
            ended = await self._pinning.cleared(self._pinning.take_gone()) or ended
        if ended:
            await self._pinning.save()
        return p.Done(message.id, count)

    def _begin(self, message: p.Clear, mark: Mark | None) -> Awaitable[int]:
        if unknown := set(message.tiers) - self._names:
            known = sorted(self._names)
            raise UsageError(f"no tier {unknown.pop()!r} here; there are {known}")
        tiers = set(message.tiers) or self._names
        if message.keys is not None:
            return self._clearer.drop(message.keys, tiers)
        ledger = self._keeping.ledger
        if mark is not None:
            if any(one.name in tiers for one in self._others):
                ledger.note(Marked(*mark))
            return self._clearer.mark(mark, tiers, aged=bool(message.before_ns))
        if tiers == self._names and all(one.takes_writes for one in self._others):
            # What peers have is not cleared with it, and stays forbidden.
            ledger.forget_marks(list(ledger.marks))
        return self._clearer.clear(tiers)

    def _mark_of(self, message: p.Clear) -> Mark | None:
        """What a clear covers beside its keys.

        Raises:
            UsageError: it cannot be.
        """
        if len(message.owner) not in (0, 16):
            raise UsageError(f"an owner of {len(message.owner)} bytes, not 16")
        if len(message.namespace) not in (0, 32):
            raise UsageError(f"a namespace of {len(message.namespace)} bytes, not 32")
        now_ns = self._wall()
        # Who reckons a time from an age may have asked another clock, or the same a moment later.
        if not 0 <= message.before_ns <= now_ns + MARGIN_NS:
            raise UsageError(f"{message.before_ns} ns is no time until now")
        if not (message.owner or message.namespace or message.before_ns):
            return None
        # What was stored since an earlier mark is dated behind that, wherever the clock stands now.
        marks = [mark.before_ns for backing in self._backings for mark in backing.marks]
        now_ns = max([now_ns, *(before_ns + 1 for before_ns in marks)])
        return Mark(message.owner, message.namespace, message.before_ns or now_ns)
