"""A connection on which another node borrows objects: heard and answered on the node's loop.

Only there can an object be held still. So no thread stands between the two, as one does where
bytes have to be sent: a loan is two short messages and their answers.
"""

from __future__ import annotations

import asyncio
import threading
from typing import NamedTuple

from kvstrata.errors import Incompatible
from kvstrata.node.lending import Lender
from kvstrata.node.slots.slot import Slot
from kvstrata.transfer import nixl
from kvstrata.transfer import peers as p
from kvstrata.transfer.tcp import LoopChannel

MAX_LOANS = 256
"""At once over one connection, so that nobody holds a whole pool still: four times as many as a
node reads at once."""


class _Loan(NamedTuple):
    slot: Slot
    until: float


class Loans:
    """What one other node borrows over one connection.

    Args:
        channel: to the other node.
        loop: the node's, on which everything is done from `serve` on.
        lender: finds what is asked for.
        by_nixl: does what it takes that the other node can read it.
    """

    def __init__(
        self,
        channel: LoopChannel,
        loop: asyncio.AbstractEventLoop,
        lender: Lender,
        by_nixl: nixl.Lender,
    ) -> None:
        self._channel = channel
        self._loop = loop
        self._lender = lender
        self._by_nixl = by_nixl
        self._lent: dict[int, _Loan] = {}  # the oldest first
        self._watch: asyncio.TimerHandle | None = None
        self._ended = threading.Event()
        self._error: Exception | None = None

    def serve(self) -> None:
        """Lend until the other end hangs up; called in a thread.

        Raises:
            OSError, Incompatible: it ends otherwise.
        """
        try:
            self._loop.call_soon_threadsafe(self._begin)
        except RuntimeError as error:
            raise ConnectionError("the node has ended") from error
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def _begin(self) -> None:
        self._loop.add_reader(self._channel.descriptor, self._hear)

    def _hear(self) -> None:
        try:
            replies: list[p.Reply] = []
            for body in self._channel.receive():
                if not body:
                    self._end(None)
                    return
                replies.append(self._answer(p.decode_request(body)))
            if replies:
                self._channel.send(*replies)
        except Exception as error:  # a bug is the thread's to report
            self._end(error)

    def _answer(self, request: p.Request) -> p.Reply:
        match request:
            case p.Borrow(number, name, most) if number not in self._lent:
                return self._lend(number, name, most)
            case p.Return(number) if number in self._lent:
                self._take_back(number, by=p.NIXL)
                return p.Taken(number)
            case other:
                raise Incompatible(f"a {type(other).__name__} out of place")

    def _lend(self, number: int, name: bytes, most: int) -> p.Lent:
        if len(self._lent) >= MAX_LOANS:
            raise Incompatible(f"it has {MAX_LOANS} loans already")
        slot = self._lender.lend(name)
        if slot is None:
            return p.Lent(number, 0, 0)
        if slot.nbytes > most:
            self._lender.give_back(slot)
            return p.Lent(number, -1, 0)
        until = self._loop.time() + p.LOAN_S
        if not self._lent and self._watch is None:
            self._watch = self._loop.call_at(until, self._look)
        self._lent[number] = _Loan(slot, until)
        self._by_nixl.begin()
        return p.Lent(number, slot.nbytes, self._lender.address(slot))

    def _take_back(self, number: int, by: str = "") -> None:
        slot, _ = self._lent.pop(number)
        self._by_nixl.end()
        self._lender.give_back(slot, by=by)

    def _look(self) -> None:
        """Whether the oldest loan has ended."""
        self._watch = None
        if self._lent:
            until = next(iter(self._lent.values())).until
            if until <= self._loop.time():
                self._end(TimeoutError(f"it did not give back a loan in {p.LOAN_S:g} s"))
            else:
                self._watch = self._loop.call_at(until, self._look)

    def _end(self, error: Exception | None) -> None:
        self._loop.remove_reader(self._channel.descriptor)
        if self._watch is not None:
            self._watch.cancel()
        for number in list(self._lent):
            self._take_back(number)
        self._error = error
        self._ended.set()
