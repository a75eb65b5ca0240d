"""One other node and the connections to it, several, each of one call at a time.

A node that fails is left alone for a while, longer each time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from kvstrata.errors import Incompatible, TierUnavailable
from kvstrata.transfer import peers as p
from kvstrata.transfer.borrowing import Borrower, Line
from kvstrata.transfer.tcp import Address, Channel, ask, introduce, unavailable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
IDLE_S = 60.0
"""A connection that nobody needed for so long is not trusted to be there still."""

Connect = Callable[[Address, float], Channel]


class Peer:
    """One other node, and the connections to it; thread-safe.

    Args:
        address: where it answers.
        connect: makes a connection, within so many seconds.
    """

    def __init__(self, address: Address, connect: Connect) -> None:
        self.address = address
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
        with self._connected(timeout_s) as channel:
            return ask(channel, request, str(self.address))

    def read(self, name: bytes, into: memoryview, timeout_s: float) -> int:
        """Have an object brought; its size, 0: it is not there, -1: it is larger.

        Raises:
            TierUnavailable: as of `call`.
        """
        deadline, target = time.monotonic() + timeout_s, _address_of(into)
        borrower = self.borrower
        if borrower is not None and borrower.reaches(target, len(into)):
            line = self._line_of(borrower, timeout_s)
            if line is not None:
                with self._judged():
                    return borrower.fetch(line, name, target, len(into), deadline)
        with self._connected(deadline - time.monotonic()) as channel:
            data = ask(channel, p.Read(name, len(into)), str(self.address))
            if not isinstance(data, p.Data) or data.nbytes > len(into):
                raise Incompatible("it sends what nobody asked for")
            if data.nbytes > 0:
                channel.receive_into(into[: data.nbytes])
            return data.nbytes

    def _line_of(self, borrower: Borrower, timeout_s: float) -> Line | None:
        """Where objects are borrowed of it; None: it does not lend."""
        line = self._line
        if line is not None and line.lasts(IDLE_S):
            return line
        with self._connected(timeout_s) as channel:
            assert channel.hello is not None
            if p.NIXL not in channel.hello.ways:
                return None
            introduce(channel, str(self.address))
            new = Line(channel)
        with self._lock:
            old = self._line
            if not self._closed and (old is None or not old.lasts(IDLE_S)):
                self._line = new
            else:  # another thread was faster
                old, new = new, old or new
        if old is not None:
            borrower.hang_up(old)
        return new

    @contextlib.contextmanager
    def _connected(self, timeout_s: float) -> Iterator[Channel]:
        """A connection of one's own meanwhile."""
        deadline = time.monotonic() + timeout_s
        with self._judged():
            channel = self._take() or self._connect(self.address, timeout_s)
            try:
                channel.begin(deadline - time.monotonic())
                yield channel
            except BaseException:
                channel.close()
                raise
        self._give(channel)

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        """What fails meanwhile makes it be left alone; what does not, makes it be asked again."""
        try:
            yield
        except (OSError, Incompatible, TierUnavailable) as error:
            trouble = unavailable(str(self.address), error)
            self._leave_alone(str(trouble))
            raise trouble from error
        if self.failed or self._pause_s > FIRST_PAUSE_S:
            with self._lock:
                self._pause_s = FIRST_PAUSE_S
                self.failed = False

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
    return int(np.frombuffer(view, np.uint8).ctypes.data)
