"""Objects on their way into a store; small ones that are ready at the same time go in one call.

A call costs the loop more than a small object costs the store: it wakes a thread, which wakes the
loop again, and all of them want the interpreter. Of large ones each has a thread to itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from kvstrata.errors import CorruptObject, TierUnavailable
from kvstrata.node.coding.recoding import stamped
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.common.background import Tasks
from kvstrata.node.service.calls import TierCalls
from kvstrata.objects import HEADER_BYTES
from kvstrata.tiers.base import Outcome, Put, Store

SMALL_BYTES = 256 << 10


class Stored(NamedTuple):
    """An object to be stored.

    Args:
        name: what the store is to know it by.
        data: header page and payload, kept still by whoever waits.
        epoch: that it is put under.
        if_absent: leave what is there of the name.
    """

    name: bytes
    data: memoryview
    epoch: int
    if_absent: bool


class _Waiting(NamedTuple):
    one: Stored
    give_up: Callable[[], None]
    outcome: asyncio.Future[Outcome]


class Puts:
    """What is put into one store; lives on the node's loop.

    Args:
        store: where they go.
        calls: into it.
        pages: buffers for their header pages.
        tasks: which the calls of several are among.
        most: small objects of one call; 1: each has its own.
    """

    def __init__(
        self, store: Store, calls: TierCalls, pages: Scratch, tasks: Tasks, most: int
    ) -> None:
        self._store = store
        self._calls = calls
        self._pages = pages
        self._tasks = tasks
        self._most = min(most, store.limits.batch_objects, store.limits.batch_bytes // SMALL_BYTES)
        self._waiting: list[_Waiting] = []

    async def put(self, one: Stored, give_up: Callable[[], None]) -> Outcome:
        """Write one object.

        Raises:
            CorruptObject: its header is damaged.
            TierUnavailable: as `TierCalls.call`, for it or for those that went with it.
        """
        if self._most <= 1 or len(one.data) > SMALL_BYTES:
            (answer,) = await self._calls.call("write", partial(self._write, [one]), give_up)
            if isinstance(answer, Outcome):
                return answer
            raise answer
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._begin)
        outcome: asyncio.Future[Outcome] = loop.create_future()
        self._waiting.append(_Waiting(one, give_up, outcome))
        return await outcome

    def _begin(self) -> None:
        """Let go what has come in this round of the loop."""
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), self._most):
            self._tasks.spawn("some writes", self._put_some(waiting[start : start + self._most]))

    async def _put_some(self, some: Sequence[_Waiting]) -> None:
        def give_up() -> None:
            for one in some:
                one.give_up()

        answers: Sequence[Outcome | Exception]
        try:
            work = partial(self._write, [one.one for one in some])
            answers = await self._calls.call("write", work, give_up)
        except TierUnavailable as error:
            answers = [error] * len(some)
        except asyncio.CancelledError:
            for one in some:
                one.outcome.cancel()
            raise
        for (_, _, outcome), answer in zip(some, answers, strict=True):
            if outcome.done():  # nobody waits for it any more
                continue
            if isinstance(answer, Outcome):
                outcome.set_result(answer)
            else:
                outcome.set_exception(answer)

    def _write(self, some: Sequence[Stored]) -> list[Outcome | CorruptObject]:
        """Write them, in a thread."""
        answers: list[Outcome | CorruptObject] = [Outcome.FAILED] * len(some)
        puts: dict[int, Put] = {}
        with contextlib.ExitStack() as pages:
            for number, (name, data, epoch, if_absent) in enumerate(some):
                page = pages.enter_context(self._pages.buffer(HEADER_BYTES))
                try:
                    page[:] = stamped(data[:HEADER_BYTES], epoch)
                except CorruptObject as error:
                    answers[number] = error
                else:
                    puts[number] = Put(name, page, data[HEADER_BYTES:], if_absent)
            if puts:
                outcomes = self._store.write(list(puts.values()))
                for number, outcome in zip(puts, outcomes, strict=True):
                    answers[number] = outcome
        return answers
