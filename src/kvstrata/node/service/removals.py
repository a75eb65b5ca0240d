"""Objects that are out of a tier's index but still in the tier: their bytes count until they go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import TypeAlias

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.node.common.background import Tasks
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.index import Index
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.entries import size_of
from kvstrata.node.service.health import Health
from kvstrata.node.service.turns import Name, Turn, Turns
from kvstrata.parts import identity
from kvstrata.tiers.base import Outcome

Verb: TypeAlias = Callable[[Sequence[bytes]], list[Outcome]]
"""`Store.delete` or `OwnedTier.reject`."""


class Removals:
    """What is to be deleted from one tier at the next chance; lives on the node's loop.

    Args:
        index: of the tier.
        delete: the tier's verb.
        batch: objects of one call, at most.
        calls: into the tier.
        turns: of its objects.
        health: is told why something could not be deleted.
        tasks: which deletions under way are among.
    """

    def __init__(
        self,
        index: Index[int],
        delete: Verb,
        batch: int,
        *,
        calls: TierCalls,
        turns: Turns,
        health: Health,
        tasks: Tasks,
    ) -> None:
        self.nbytes = 0
        self._index = index
        self._delete = delete
        self._batch = batch
        self._calls = calls
        self._turns = turns
        self._health = health
        self._tasks = tasks
        self._doomed: dict[Name, int] = {}
        self._untried: dict[Name, None] = {}  # of these, what no removal has been asked for
        self._num_under_way = 0
        self._ends: asyncio.Future[None] | None = None

    def __contains__(self, name: Name) -> bool:
        return name in self._doomed

    def add(self, key: bytes, part: int, nbytes: int) -> None:
        """Delete an object that is not in the index; its bytes are claimed already."""
        self._doomed[key, part] = self._doomed.get((key, part), 0) + nbytes
        self._untried[key, part] = None
        self.nbytes += nbytes

    def condemn(self, key: bytes, part: int, cause: Cause) -> bool:
        """Take an object out of the index and delete it; False where there is none."""
        entry = self._index.pop(key, part, cause)
        if entry is None:
            return False
        self._index.claim_existing(size_of(entry))
        self.add(key, part, size_of(entry))
        return True

    def condemn_chunk(self, key: bytes, cause: Cause) -> list[Name]:
        """Do so with all objects of a chunk; their names."""
        # In one go: whoever hears of it finds nothing of the chunk here any more.
        objects = self._index.pop_chunk(key, cause)
        for part, entry in objects:
            self._index.claim_existing(size_of(entry))
            self.add(key, part, size_of(entry))
        return [(key, part) for part, _ in objects]

    def gone(self, key: bytes, part: int) -> None:
        """What was here under this name has gone, or a new object has taken its place."""
        self._untried.pop((key, part), None)
        nbytes = self._doomed.pop((key, part), 0)
        self.nbytes -= nbytes
        self._index.unclaim(nbytes)

    def idle(self) -> list[Name]:
        """Some of what can be deleted at once, since nobody is at it."""
        if self._turns.all_taken:
            return []
        names = (name for name in self._untried if not self._turns.busy(name))
        return list(islice(names, self._batch))

    async def next_end(self) -> bool:
        """Wait until a removal that is under way has ended, or hangs; False if there is none."""
        if not self._num_under_way:
            return False
        if self._ends is None:
            self._ends = asyncio.get_running_loop().create_future()
        await self._ends
        return True

    def run(self, names: Collection[Name]) -> asyncio.Future[bool]:
        """Delete these once it is their turn; the places in their queues are taken now.

        Returns:
            Whether all of them have gone; False already when a deletion hangs. What has not gone
            stays, and is tried again.
        """
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        free = [name for name in names if not self._turns.hangs(name)]
        for name in free:
            self._untried.pop(name, None)
        work = self._run(self._turns.take(free), answer, len(free) == len(names))
        self._tasks.spawn("a removal", work)
        return answer

    async def run_in(
        self, turn: Turn, verb: Verb | None = None, give_up: Callable[[], None] = lambda: None
    ) -> bool:
        """Delete what is doomed of a turn that has come; the answer as of `run`."""
        names = [name for name in turn.names if name in self._doomed]
        gone = True
        for start in range(0, len(names), self._batch):
            batch = names[start : start + self._batch]
            gone = await self._take_out(batch, verb or self._delete, give_up) and gone
        return gone

    async def _run(self, turn: Turn, answer: asyncio.Future[bool], all_free: bool) -> None:
        under_way = False

        def settle(gone: bool) -> None:
            nonlocal under_way
            if under_way:
                under_way = False
                self._num_under_way -= 1
                ends, self._ends = self._ends, None
                if ends is not None:
                    ends.set_result(None)
            if not answer.done():
                answer.set_result(gone)

        def give_up() -> None:
            turn.hang()
            settle(False)

        gone = False
        try:
            with turn:
                await turn.come()
                under_way = True
                self._num_under_way += 1
                gone = await self.run_in(turn, None, give_up) and all_free
        except TierUnavailable:  # somebody ahead hangs, and has said so
            pass
        finally:
            self._untried.update((name, None) for name in turn.names if name in self._doomed)
            settle(gone)

    async def _take_out(self, names: list[Name], verb: Verb, give_up: Callable[[], None]) -> bool:
        ids = [identity(key, part) for key, part in names]
        trouble: TierUnavailable | None = None
        try:
            outcomes = await self._calls.call("deletion", lambda: verb(ids), give_up)
        except TierUnavailable as error:
            trouble, outcomes = error, [Outcome.FAILED] * len(ids)
        for name, outcome in zip(names, outcomes, strict=True):
            if outcome is not Outcome.FAILED:
                self.gone(*name)
            elif trouble is None:
                trouble = TierFull("objects cannot be deleted")
        if trouble is None:
            self._health.worked()
        else:
            self._health.trip(trouble)
        return trouble is None
