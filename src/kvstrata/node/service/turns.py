"""One queue per object: what is asked of one and the same object is done in that order.

A place in the queues is taken at once, also in those of many objects together, so whoever came
first everywhere goes first everywhere and nobody waits in a circle. Idle objects have no queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import TypeAlias

from kvstrata.errors import TierUnavailable

Name: TypeAlias = tuple[bytes, int]
"""Key and part of an object."""


class Turn:
    """A place in the queues of some objects; ends with its ``with``, whether it came or not."""

    def __init__(self, turns: Turns, names: tuple[Name, ...]) -> None:
        self.names = names
        self.hangs = False
        self.num_ahead = 0  # queues in which others are ahead
        self.ahead_of_all: list[Turn] = []  # turns for all objects, which are ahead too
        self.followers: list[Turn] = []  # of a turn for all objects: who has come since
        self._turns = turns
        self._waiting: asyncio.Future[None] | None = None

    async def come(self) -> None:
        """Wait until it is one's turn.

        Raises:
            TierUnavailable: somebody ahead hangs; nobody knows for how long.
        """
        while self.num_ahead:
            if self._turns.stuck(self):
                raise TierUnavailable("an earlier call on the object still hangs")
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting

    def hang(self) -> None:
        """What is done in this turn has not ended in time: those behind need not wait for it."""
        self.hangs = True
        for other in self._turns.behind(self):
            other.wake()

    def wake(self) -> None:
        """Let it look again whether it can go on."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def advance(self) -> None:
        """One queue fewer in which others are ahead."""
        self.num_ahead -= 1
        self.wake()

    def __enter__(self) -> Turn:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._turns.end(self)


class Turns:
    """The queues of one tier; lives on the node's loop."""

    def __init__(self) -> None:
        self._queues: dict[Name, list[Turn]] = {}
        self._of_all: list[Turn] = []

    def __len__(self) -> int:
        return len(self._queues) + len(self._of_all)

    @property
    def all_taken(self) -> bool:
        """Whether somebody is at all objects."""
        return bool(self._of_all)

    def take(self, names: Iterable[Name]) -> Turn:
        """A place behind all who asked for one of these objects before."""
        turn = Turn(self, tuple(dict.fromkeys(names)))
        for name in turn.names:
            queue = self._queues.setdefault(name, [])
            turn.num_ahead += bool(queue)
            queue.append(turn)
        turn.ahead_of_all = [*self._of_all]
        turn.num_ahead += len(turn.ahead_of_all)
        for other in turn.ahead_of_all:
            other.followers.append(turn)
        return turn

    def take_all(self) -> Turn:
        """A place before whatever is asked of any object from now on; it waits for nobody."""
        turn = Turn(self, ())
        self._of_all.append(turn)
        return turn

    def busy(self, name: Name) -> bool:
        """Whether somebody is at an object."""
        return name in self._queues or self.all_taken

    def hangs(self, name: Name) -> bool:
        """Whether somebody who is at an object hangs."""
        return any(turn.hangs for turn in (*self._of_all, *self._queues.get(name, ())))

    def stuck(self, turn: Turn) -> bool:
        """Whether somebody ahead of this one hangs."""
        if any(other.hangs for other in turn.ahead_of_all):
            return True
        for name in turn.names:
            for other in self._queues[name]:
                if other is turn:
                    break
                if other.hangs:
                    return True
        return False

    def behind(self, turn: Turn) -> list[Turn]:
        """Who waits behind this one, and perhaps others that stand beside it."""
        return [*turn.followers, *(other for name in turn.names for other in self._queues[name])]

    def end(self, turn: Turn) -> None:
        """Leave all queues, from wherever in them."""
        for name in turn.names:
            queue = self._queues[name]
            first = queue[0] is turn
            queue.remove(turn)
            if not queue:
                del self._queues[name]
            elif first:
                queue[0].advance()
        if turn in self._of_all:
            self._of_all.remove(turn)
            for other in turn.followers:
                other.ahead_of_all.remove(turn)
                other.advance()
