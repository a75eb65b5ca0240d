"""Chunks that a peer is about to have: it computes them for a request that is here already.

Their slots are made and leased at once, so that the engine can begin to load, and each is filled as
soon as the peer has it. What does not come in time is given up, and ends the load there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

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

Foreseen = list[tuple[bytes, list[Slot]]]
"""Chunks in their order, and the slots to be filled with what they lack."""


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
        chunks: Foreseen,
        patience_s: float,
    ) -> None:
        """Fill slots as the peer has what belongs into them.

        Args:
            peers: asks the peer that the question names.
            question: of any of its chunks.
            load: what the slots were made for.
            chunks: that are to come.
            patience_s: how long to wait for another chunk before the rest is given up.
        """
        self._tasks.spawn("an expectation", self._follow(peers, question, load, chunks, patience_s))

    async def close(self) -> None:
        """Follow nobody any more."""
        await self._tasks.cancel()

    async def _follow(
        self,
        peers: PeerBacking,
        question: Question,
        load: Load,
        chunks: Foreseen,
        patience_s: float,
    ) -> None:
        assert question.peer is not None
        since, pause = self._clock(), FIRST_PAUSE_S
        while chunks := self._still_wanted(chunks):
            some = chunks[:AHEAD]
            keys = [key for key, _ in some]
            await peers.ask(question._replace(keys=keys))
            there = _leading(peers, question, keys)
            for _, slots in some[:there]:
                self._movement.start(load, slots, len(question.parts))
            if there:
                self._counters.add("followed_chunks_total", there)
                chunks, since, pause = chunks[there:], self._clock(), FIRST_PAUSE_S
            elif self._clock() - since >= patience_s or peers.fails(question.peer):
                break
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        self._movement.give_up([slot for _, slots in chunks for slot in slots])

    def _still_wanted(self, chunks: Foreseen) -> Foreseen:
        """Without those that nobody waits for any more, or that were forgotten."""
        return [one for one in chunks if any(map(self._movement.is_prepared, one[1]))]


def _leading(peers: PeerBacking, question: Question, keys: Sequence[bytes]) -> int:
    """How many of the leading chunks the peer has, whole."""
    count = 0
    for key in keys:
        if any(peers.find(key, part, question.orders) is None for part in question.parts):
            break
        count += 1
    return count
