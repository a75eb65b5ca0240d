"""What leaves an owned tier, and why: evicted, cleared, corrupt, lost, or moved elsewhere.

It is out of the index before it leaves the tier, and its bytes count until it has gone. What was
cleared does not come back, whoever finds it: a scan that is still under way, a write, a read, or
another process; so marks are kept until all that is here has been held against them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from kvstrata.errors import TierUnavailable
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.index import Index
from kvstrata.node.service.clears import Clears
from kvstrata.node.service.entries import entry_of, generation_of, same_object, size_of
from kvstrata.node.service.ledger import Keeping, Ledger, Marked
from kvstrata.node.service.owners_room import OwnersRoom
from kvstrata.node.service.removals import Removals, Verb
from kvstrata.node.service.scan import Scan
from kvstrata.node.service.single import Singly
from kvstrata.node.service.striking import Striking
from kvstrata.node.service.turns import Turn
from kvstrata.parts import at_level
from kvstrata.policies.base import Policy
from kvstrata.tiers.base import Outcome, OwnedTier
from kvstrata.tiers.marks import Mark


class Leaving(Singly):
    """What takes objects out of an owned tier.

    Args:
        tier: where the objects are.
        capacity_bytes: the hard bound on what it may hold.
        policy: orders its chunks for eviction.
        others: as of `Backing`.
    """

    tier: OwnedTier
    writes_together = True

    def __init__(self, tier: OwnedTier, capacity_bytes: int, policy: Policy, **others: Any) -> None:
        super().__init__(tier, **others)
        self.capacity_bytes = capacity_bytes
        self.index: Index[int] = Index(capacity_bytes, policy, size_of)
        self.wall: Callable[[], int] = time.time_ns  # the node's
        self.ledger = Ledger(tier.journal)
        self.marks = self.ledger.marks
        self._keeping = Keeping(self.ledger, self.name)
        self._removals = Removals(
            self.index, lambda ids: self.tier.delete(ids), tier.limits.batch_objects,
            calls=self._calls, turns=self._turns, health=self._health, tasks=self._tasks,
        )  # fmt: skip
        self.quotas = OwnersRoom(self.index, self._removals, self.name, self._counters)
        self._striking = Striking(self.index, self._removals)
        self._clears = Clears(
            self.name, self.index, self._removals,
            calls=self._calls, turns=self._turns, health=self._health, tasks=self._tasks,
        )  # fmt: skip
        self._scan = Scan(
            self.index, self._removals, self._calls, self._entries, lambda n: self._make_room(n)
        )
        self.num_marking = 0  # clears by mark that are not done yet
        # Whether each object has been read, or was written here, and is whose its chunk is.
        self._all_read, self._mixed = False, False
        self._generations = itertools.count(1)

    # evicted

    def evict(self, key: bytes) -> None:
        """Delete a chunk for another that is there; nobody waits for it."""
        if names := self._removals.condemn_chunk(key, Cause.EVICTED):
            self._removals.run(names)

    async def _make_room(self, nbytes: int) -> bool:
        """Claim bytes, evicting what it takes; False if they cannot be had.

        What somebody is at is evicted too, but not waited for: two that did would wait for ever.
        """
        if nbytes > min(self.capacity_bytes, self.tier.limits.batch_bytes):
            return False
        while not self.index.claim(nbytes):
            victim: bytes | None
            if (spare := self.index.spare()) is not None:
                victim = spare[0]
                for level in range(1 + len(self.coarser)):
                    self._removals.condemn(victim, at_level(spare[1], level), Cause.EVICTED)
            elif (victim := self.index.victim(lambda _: True)) is not None:
                self._counters.add("evicted_chunks_total", tier=self.name)
                self._removals.condemn_chunk(victim, Cause.EVICTED)
            if doomed := self._removals.idle():
                if not await self._removals.run(doomed):
                    return False
            elif victim is None and not await self._removals.next_end():
                return False
        return True

    # cleared

    def clear(self) -> Awaitable[int]:
        self._scan.forget(None)
        for writing in self._writes:
            writing.wanted = False
        return self._cleared(self._clears.begin(lambda: self.tier.clear()), list(self.marks))

    async def _cleared(self, clear: Awaitable[int], marks: list[Mark]) -> int:
        count = await clear
        self.ledger.forget_marks(marks)  # of before the epoch there is nothing any more
        return count

    def mark(self, mark: Mark, *, aged: bool) -> Awaitable[int]:
        """See `Backing.mark`; of what nobody has read yet the reads will tell."""
        self.ledger.note(Marked(*mark))
        return self._marked(asyncio.ensure_future(self.save()), self._striking.begin(mark, aged))

    async def _marked(self, saving: asyncio.Future[None], striking: Awaitable[int] | int) -> int:
        count = striking if isinstance(striking, int) else await striking
        await saving
        return count

    def lacks(self, mark: Mark) -> bool:
        """Whether nothing that a mark is about is here, on its way, or found by a later process."""
        known = self._all_read and not self._mixed and not self.under_way
        left = self._removals.nbytes or self._clears.nbytes
        return known and not left and not self.index.owners.may_have(mark)

    def settled_marks(self) -> list[Mark]:
        """The marks, once everything else has been told of them too."""
        return [] if self.num_marking else list(self.marks)

    def passed(self, marks: list[Mark], under_way: set[object]) -> None:
        """All that is here has been read since these marks were settled.

        They have done their part, unless something may still bring what was here before, or
        waits for its deletion, which a later process would find.

        Args:
            marks: what may be forgotten.
            under_way: what was when the last of it had been read.
        """
        self._all_read = True
        if marks and not self._removals.nbytes and under_way.isdisjoint(self.under_way):
            self.ledger.forget_marks(marks)

    def drop(self, keys: Iterable[bytes]) -> Awaitable[int]:
        gone = set(keys)
        self._scan.forget(gone)
        names = [name for key in gone for name in self._removals.condemn_chunk(key, Cause.CLEARED)]
        num_objects = len(names)
        for writing in self._writes:
            writing.wanted = writing.wanted and writing.key not in gone
        # Of a write that is under way nothing is left once it has had its turn.
        names += [one.name for one in self._writes if one.name and one.key in gone]
        return self._dropped(self._removals.run(names), gone, num_objects)

    async def _dropped(
        self, removal: asyncio.Future[bool], keys: set[bytes], num_objects: int
    ) -> int:
        all_gone = await removal
        if not self._scan.done:
            # What the scan has yet to find is still there, and another process would find it too.
            all_gone = await self._scan.ended() and all_gone
            names = [name for key in keys for name in self._scan.struck.get(key, ())]
            num_objects += len(names)
            all_gone = await self._removals.run(names) and all_gone
        if not all_gone:
            raise TierUnavailable(
                f"{self.name}: not all of it could be deleted; it is not served any more, but may "
                f"be there again after a restart: {self._health.trouble}"
            )
        return num_objects

    async def save(self) -> None:
        """Write down what an operator has said of this tier.

        Raises:
            TierUnavailable: it holds, and does not outlive the process.
        """
        await self._keeping.save(lambda work: self._calls.call("note", work))

    # corrupt, lost, or moved

    def _reject(self, key: bytes, part: int, seen: Any) -> None:
        self._take_out(key, part, seen, Cause.CORRUPT, lambda ids: self.tier.reject(ids))

    def _strike(self, key: bytes, part: int, seen: Any) -> None:
        self._take_out(key, part, seen, Cause.CLEARED, lambda ids: self.tier.delete(ids))

    def _missed(self, key: bytes, part: int, seen: Any, outcome: Outcome) -> None:
        # What the tier failed with must not stand in the way of a fresh copy.
        self._take_out(key, part, seen, Cause.LOST, lambda ids: self.tier.delete(ids))

    def _take_out(self, key: bytes, part: int, seen: Any, cause: Cause, verb: Verb) -> None:
        """Delete an object unless it has been replaced since it was seen; nobody waits for it."""

        async def work(turn: Turn) -> None:
            with turn, contextlib.suppress(TierUnavailable):  # which has been said already
                await turn.come()
                if same_object(self.index.get(key, part), seen):
                    self._removals.condemn(key, part, cause)
                    await self._removals.run_in(turn, verb, turn.hang)

        self._tasks.spawn("a removal", work(self._turns.take([(key, part)])))

    async def remove(self, key: bytes, part: int, seen: Any, cause: Cause) -> bool:
        """See `Singly.remove`."""
        levels = [(key, at_level(part, level)) for level in range(1 + len(self.coarser))]
        with self._turns.take(levels) as turn:
            await turn.come()
            if not same_object(self.index.get(key, part), seen):
                return False
            for name in levels:
                self._removals.condemn(*name, cause)
            return await self._removals.run_in(turn, None, turn.hang)

    # how

    def _entries(self, sizes: Iterable[int], order: int = 0) -> list[int]:
        """Index entries for objects of these sizes that have just come, one at least."""
        generations = self._generations
        entries = [entry_of(nbytes, order, next(generations)) for nbytes in sizes]
        self._striking.ages.note(generation_of(entries[0]), self.wall())
        return entries

    # laws

    def check_integrity(self) -> None:
        """Raise AssertionError unless every byte that counts has one reason to."""
        self.index.check_integrity()
        writing = sum(one.claimed for one in self._writes)
        doomed, cleared = self._removals.nbytes, self._clears.nbytes
        assert self.index.claimed_bytes == doomed + writing + cleared, (
            f"{self.index.claimed_bytes} bytes claimed, but {doomed} doomed, {writing} being "
            f"written and {cleared} being cleared"
        )
