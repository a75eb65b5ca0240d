"""From where, and to where, the library may move an object's bytes.

Over TCP it reads and writes any memory of this process, so all of it moves without a copy and
nothing is registered: what is registered can be read and written by whoever reaches the library's
port, and the pool of a node is nobody else's business. Over RDMA the network card needs the memory
registered. The pool is, once. What lies elsewhere (a header page, an object on its way through a
codec) comes and goes with its buffer, and a registration that outlives its memory would point
anywhere; so those bytes are copied through the library's own registered buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvstrata.errors import DeadlineExceeded, TierUnavailable

NEED_NO_REGISTRATION = frozenset({"tcp"})

BUFFER_WAIT_S = 1.0
"""For how long a call waits for one of the library's buffers while others have them all."""


def address_of(view: memoryview) -> int:
    """Where its first byte lies in this process."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


class Loan:
    """Memory that the library reads or writes: the caller's own, or a stand-in for it."""

    def __init__(self, view: memoryview, stand_in: Any | None) -> None:
        self.nbytes = len(view)
        self.address = address_of(view) if stand_in is None else stand_in.ptr
        self._view = view
        self._stand_in = stand_in

    @property
    def direct(self) -> bool:
        """Whether it is the caller's own."""
        return self._stand_in is None

    def take_in(self) -> None:
        """Have the caller's bytes there, before the library reads them."""
        if self._stand_in is not None:
            self._stand_in.buffer[:] = self._view

    def give_back(self, nbytes: int) -> None:
        """Let the caller have the first bytes of what the library wrote."""
        if self._stand_in is not None:
            self._view[:nbytes] = self._stand_in.buffer[:nbytes]

    def end(self) -> None:
        """The library is done with it."""
        if self._stand_in is not None:
            self._stand_in.release()


class Memory:
    """What one client of the library has registered.

    Args:
        store: the library's client.
        buffers: the library's registered buffers; None: nothing needs to be registered.
    """

    def __init__(self, store: Any, buffers: Any | None) -> None:
        self._store = store
        self._buffers = buffers
        self._begin = self._end = 0

    @property
    def registered_bytes(self) -> int:
        """Of the pool; 0 until that is done."""
        return self._end - self._begin

    def register(self, pool: memoryview) -> None:
        """Register the pool; until this is done it is memory like any other. Takes its time."""
        if self._buffers is None:
            return
        begin = address_of(pool)
        if code := self._store.register_buffer(begin, len(pool)):
            raise TierUnavailable(f"the pool cannot be registered (code {code})")
        self._begin, self._end = begin, begin + len(pool)

    @contextmanager
    def lend(self, views: Sequence[memoryview]) -> Iterator[list[Loan]]:
        """Memory for each view, for the time of a ``with``.

        Raises:
            DeadlineExceeded: the library's buffers are in use, or too small.
        """
        loans: list[Loan] = []
        try:
            for view in views:
                loans.append(Loan(view, self._stand_in(view)))
            yield loans
        finally:
            for loan in loans:
                loan.end()

    def _stand_in(self, view: memoryview) -> Any | None:
        if self._buffers is None:
            return None
        begin = address_of(view)
        if self._begin <= begin and begin + len(view) <= self._end:
            return None
        try:
            return self._buffers.acquire(len(view))
        except RuntimeError as error:
            raise DeadlineExceeded(f"no registered buffer of {len(view)} bytes: {error}") from error
