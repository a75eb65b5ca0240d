"""One other node and the connections to it, several, each of one call at a time.

A node that fails is left alone for a while, longer each time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from ctypes import addressof, c_char
from typing import TypeVar

from kvstrata.errors import Incompatible, TierUnavailable
from kvstrata.transfer import peers as p
from kvstrata.transfer.borrowing import Borrower, Line
from kvstrata.transfer.tcp import Address, Channel, ask, fetch, introduce, unavailable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
IDLE_S = 60.0
"""A connection that nobody needed for so long is not trusted to be there still."""

R = TypeVar("R")

Connect = Callable[[Address, float], Channel]


class Peer:
    """One other node, and the connections to it; thread-safe.

    Args:
        address: where it answers.
        connect: makes a connection, within so many seconds.
    """

    def __init__(self, address: Address, connect: Connect) -> None:
        self.address = address
        self._where = str(address)
        self.failed = False
        """Whether it is left alone: it failed, and has not answered since."""
        self.trouble = ""
        """Of its last failure, in words."""
        self.borrower: Borrower | None = None
        """Reads by NIXL, where both ends have it."""
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[tuple[Channel, float]] = []
        self._line: Line | None = None
        self._again_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._closed = False

    @property
    def due(self) -> bool:
        """Whether it failed long enough ago to be tried again."""
        return self.failed and time.monotonic() >= self._again_at

    def call(self, request: p.Request, timeout_s: float) -> p.Reply:
        """Ask it.

        Raises:
            TierUnavailable: it failed, and is left alone for a while.
        """
        return self._connected(timeout_s, lambda channel: ask(channel, request, self._where))

    def read(self, name: bytes, into: memoryview, timeout_s: float) -> int:
        """Have an object brought; its size, 0: it is not there, -1: it is larger.

        Raises:
            TierUnavailable: as of `call`.
        """
        deadline, borrower = time.monotonic() + timeout_s, self.borrower
        if borrower is not None and borrower.reaches(target := _address_of(into), len(into)):
            line = self._line_of(borrower, timeout_s)
            if line is not None:
                size = len(into)
                return self._judged(lambda: borrower.fetch(line, name, target, size, deadline))
        left_s = deadline - time.monotonic()
        return self._connected(left_s, lambda channel: fetch(channel, name, into, self._where))

    def _line_of(self, borrower: Borrower, timeout_s: float) -> Line | None:
        """Where objects are borrowed of it; None: it does not lend."""
        line = self._line
        if line is not None and line.lasts(IDLE_S):
            return line
        new = self._connected(timeout_s, self._new_line)
        if new is None:
            return None
        with self._lock:
            old = self._line
            if not self._closed and (old is None or not old.lasts(IDLE_S)):
                self._line = new
            else:  # another thread was faster
                old, new = new, old or new
        if old is not None:
            borrower.hang_up(old)
        return new

    def _new_line(self, channel: Channel) -> Line | None:
        assert channel.hello is not None
        if p.NIXL not in channel.hello.ways:
            return None
        introduce(channel, self._where)
        return Line(channel)

    def _connected(self, timeout_s: float, work: Callable[[Channel], R]) -> R:
        """What ``work`` makes of a connection that is its own meanwhile; judged."""
        deadline = time.monotonic() + timeout_s

        def connected() -> R:
            channel = self._take() or self._connect(self.address, timeout_s)
            try:
                channel.begin(deadline - time.monotonic())
                answer = work(channel)
            except BaseException:
                channel.close()
                raise
            self._give(channel)
            return answer

        return self._judged(connected)

    def _judged(self, work: Callable[[], R]) -> R:
        """What fails makes it be left alone; what does not, makes it be asked again.

        Raises:
            TierUnavailable: it failed.
        """
        try:
            answer = work()
        except (OSError, Incompatible, TierUnavailable) as error:
            trouble = unavailable(self._where, error)
            self._leave_alone(str(trouble))
            raise trouble from error
        if self.failed or self._pause_s > FIRST_PAUSE_S:
            with self._lock:
                self._pause_s = FIRST_PAUSE_S
                self.failed = False
        return answer

    def close(self) -> None:
        """Hang up. Repeatable."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for channel, _ in idle:
            channel.close()
        if self.borrower is not None and self._line is not None:
            self.borrower.hang_up(self._line)

    def _take(self) -> Channel | None:
        old: list[Channel] = []
        try:
            with self._lock:
                if self._closed:
                    raise TierUnavailable("peer: the tier is closed")
                while self._idle:
                    channel, since = self._idle.pop()
                    if time.monotonic() - since < IDLE_S:
                        return channel
                    old.append(channel)
                return None
        finally:
            for channel in old:
                channel.close()

    def _give(self, channel: Channel) -> None:
        if channel.agent is not None:
            return  # for loans from now on
        with self._lock:
            if not self._closed:
                self._idle.append((channel, time.monotonic()))
                return
        channel.close()

    def _leave_alone(self, trouble: str) -> None:
        """Its other connections are as good as dead, too."""
        with self._lock:
            idle, self._idle = self._idle, []
            if not self.failed or self.due:
                self._again_at = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self.failed, self.trouble = True, trouble
        for channel, _ in idle:
            channel.close()


def _address_of(view: memoryview) -> int:
    return addressof(c_char.from_buffer(view))
