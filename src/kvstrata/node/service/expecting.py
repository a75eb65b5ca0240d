"""Objects that a peer is about to have: it computes them for a request that is here already.

Their slots are made and leased at once, so that the engine can begin to load, and each is filled as
soon as the peer has it. What does not come in time is given up, and ends the load there.

Of layers that need every chunk the next chunks come, one after the other, so they tell how far the
peer is. Of windows and states only those of the prompt's end are waited for.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvstrata.node.common.background import Tasks
from kvstrata.node.service.backing import Question
from kvstrata.node.service.movement import Movement
from kvstrata.node.service.peers import PeerBacking
from kvstrata.node.service.promotions import Load
from kvstrata.node.slots.slot import Slot
from kvstrata.observe.counters import Counters

AHEAD = 64
"""Chunks of one request that the peer is asked for at once."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.02
"""Between two questions for one request."""
LAST_S = 2.0
"""For what is left when all has come that is needed of every chunk: the prompt is computed then."""


class Foreseen(NamedTuple):
    """An object that is to come, and the slot to be filled with it."""

    key: bytes
    part: int
    slot: Slot


class Expecting:
    """Follows peers' progress; lives on the node's loop.

    Args:
        movement: has made the slots, and fills them.
        counters: the node's.
        clock: monotonic seconds.
    """

    def __init__(self, movement: Movement, counters: Counters, clock: Callable[[], float]) -> None:
        self._movement = movement
        self._counters = counters
        self._clock = clock
        self._tasks = Tasks(counters)

    def follow(
        self,
        peers: PeerBacking,
        question: Question,
        load: Load,
        objects: Sequence[Foreseen],
        patience_s: float,
    ) -> None:
        """Fill slots as the peer has what belongs into them.

        Args:
            peers: asks the peer that the question names.
            question: of any of its chunks, with all parts that make one up.
            load: what the slots were made for.
            objects: that are to come, in the order of their chunks.
            patience_s: how long to wait for another one before the rest is given up.
        """
        following = self._follow(peers, question, load, deque(objects), patience_s)
        self._tasks.spawn("an expectation", following)

    async def close(self) -> None:
        """Follow nobody any more."""
        await self._tasks.cancel()

    async def _follow(
        self,
        peers: PeerBacking,
        question: Question,
        load: Load,
        objects: deque[Foreseen],
        patience_s: float,
    ) -> None:
        assert question.peer is not None
        needs = dict(zip(question.parts, question.needs or itertools.repeat(0), strict=False))
        leading = [one for one in objects if not needs[one.part]] if any(question.needs) else []
        left = Counter(one.key for one in objects)
        since, pause = self._clock(), FIRST_PAUSE_S
        while run := self._next_run(objects, needs):
            await peers.ask(_of_run(question, needs, run))
            there = [one for one in run if _has(peers, question, one)]
            self._movement.start(load, [one.slot for one in there], len(question.parts))
            if there:
                left.subtract(one.key for one in there)
                whole = sum(not left[key] for key in {one.key for one in there})
                self._counters.add("followed_chunks_total", whole)
                since, pause = self._clock(), FIRST_PAUSE_S
                continue
            computed = leading and not self._movement.prepared(leading[-1].slot)
            patience = min(patience_s, LAST_S) if computed else patience_s
            if self._clock() - since >= patience or peers.fails(question.peer):
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        self._movement.give_up([one.slot for one in objects])

    def _next_run(self, objects: deque[Foreseen], needs: Mapping[int, int]) -> list[Foreseen]:
        """What is to come of the next chunks: of every chunk alone, or of the last ones, too.

        What comes already, or is not wanted any more, is dropped.
        """
        while objects and not self._movement.prepared(objects[0].slot):
            objects.popleft()
        chunks: dict[bytes, list[Foreseen]] = {}
        for one in objects:
            if one.key not in chunks and len(chunks) == AHEAD:
                break
            if self._movement.prepared(one.slot):
                chunks.setdefault(one.key, []).append(one)
        # Many parts of many chunks are many questions for the peer, most of them too early.
        runs = itertools.groupby(chunks.values(), lambda some: any(needs[one.part] for one in some))
        return [one for _, run in itertools.islice(runs, 1) for some in run for one in some]


def _of_run(question: Question, needs: Mapping[int, int], run: Sequence[Foreseen]) -> Question:
    """Whether the peer has what is to come."""
    keys = list(dict.fromkeys(one.key for one in run))
    parts = tuple(dict.fromkeys(one.part for one in run))
    some = tuple(needs[part] for part in parts)
    return question._replace(keys=keys, parts=parts, needs=some if any(some) else ())


def _has(peers: PeerBacking, question: Question, one: Foreseen) -> bool:
    """Whether the peer has said that it has an object."""
    return peers.find(one.key, one.part, question.orders) is not None
