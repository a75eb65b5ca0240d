"""Clears of a whole tier: forgotten at once, and counted until the tier has done its part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TypeAlias

from kvstrata.errors import TierUnavailable
from kvstrata.node.common.background import Tasks
from kvstrata.node.common.index import Index
from kvstrata.node.common.slices import Work, in_slices
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.entries import size_of
from kvstrata.node.service.health import Health
from kvstrata.node.service.removals import Removals
from kvstrata.node.service.turns import Turn, Turns

SLICE = 64

Chunk: TypeAlias = tuple[bytes, tuple[object, ...]]
"""A key, and what an index has of it."""


class Clears:
    """What clears have taken out of one tier's index; lives on the node's loop.

    Args:
        name: of the tier.
        index: of the tier.
        removals: get what a clear failed with.
        calls: into the tier.
        turns: of its objects.
        health: is told what became of it.
        tasks: which clears under way are among.
    """

    def __init__(
        self,
        name: str,
        index: Index[int],
        removals: Removals,
        *,
        calls: TierCalls,
        turns: Turns,
        health: Health,
        tasks: Tasks,
    ) -> None:
        self.nbytes = 0
        self._name = name
        self._index = index
        self._removals = removals
        self._calls = calls
        self._turns = turns
        self._health = health
        self._tasks = tasks

    def begin(self, verb: Callable[[], None]) -> asyncio.Future[int]:
        """Forget everything now, and let the tier do so; the answer as of `Backing.clear`.

        What is asked of any object from now on comes after it, or it would be struck.
        """
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        count = self._index.num_objects
        held = self._index.used_bytes - self._index.claimed_bytes
        self.nbytes += held
        work = self._run(verb, self._turns.take_all(), self._index.clear(), held, count, answer)
        self._tasks.spawn(f"a clear of {self._name}", work)
        return answer

    async def _run(
        self,
        verb: Callable[[], None],
        turn: Turn,
        chunks: Iterator[Chunk],
        held: int,
        count: int,
        answer: asyncio.Future[int],
    ) -> None:
        def fail(why: str) -> None:
            if not answer.done():
                answer.set_exception(TierUnavailable(
                    f"{self._name}: nothing of it is served any more, but it may be there again "
                    f"after a restart: {why}"
                ))  # fmt: skip

        def give_up() -> None:
            turn.hang()
            fail(self._health.trouble)

        with turn:
            try:
                await self._calls.call("clear", verb, give_up)
            except TierUnavailable as error:
                await _done(self._doom(chunks))
                self._health.trip(error)
                fail(str(error))
                return
            self.nbytes -= held
            self._index.unclaim(held)
        self._health.worked()
        if not answer.done():
            answer.set_result(count)
        await _done(_let_go(chunks))

    def _doom(self, chunks: Iterator[Chunk]) -> Work[None]:
        for number, (key, flat) in enumerate(chunks, 1):
            for part, entry in zip(flat[1::2], flat[2::2], strict=True):
                assert isinstance(part, int)
                assert isinstance(entry, int)
                self.nbytes -= size_of(entry)
                self._removals.add(key, part, size_of(entry))
            if number % SLICE == 0:
                yield None


def _let_go(chunks: Iterator[Chunk]) -> Work[None]:
    for number, _ in enumerate(chunks, 1):
        if number % SLICE == 0:
            yield None


async def _done(work: Work[None]) -> None:
    if (rest := in_slices(work)) is not None:
        await rest
