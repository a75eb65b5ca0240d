"""Objects of other nodes, read by NIXL: one thread reads them, and says what has to be said.

One, since an agent does one thing at a time, and since nobody has to be woken for a word: while it
reads one object, what is said of those before and behind it is on its way.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvstrata.errors import Incompatible, PeerRefused, TierUnavailable
from kvstrata.transfer import peers as p
from kvstrata.transfer.nixl import Agent, Lender, Memory
from kvstrata.transfer.tcp import Channel

SPIN_S = 0.001
SLEEP_S = 0.00005

logger = logging.getLogger(__name__)


class Line:
    """A connection to one other node, on which its objects are borrowed; of the borrower's thread.

    Args:
        channel: one for loans; owned from now on.
    """

    def __init__(self, channel: Channel) -> None:
        assert channel.agent is not None
        self.agent = channel.agent
        self.channel = channel.on_loop()
        self.words: list[p.Request] = []
        """What is yet to be said."""
        self.reads: dict[int, _Read] = {}
        """All that are under way, by the numbers of their loans."""
        self.error: Exception | None = None
        """Why it has come to its end."""
        self.used_at = time.monotonic()

    def lasts(self, idle_s: float) -> bool:
        """Whether it can be used, and was, within so many seconds."""
        return self.error is None and time.monotonic() - self.used_at < idle_s


@dataclass(eq=False)
class _Read:
    line: Line
    name: bytes
    target: int
    most: int
    deadline: float
    number: int
    nbytes: int = 0
    address: int = 0
    came: bool = False
    ended: Future[int] = field(default_factory=Future)


class Borrower:
    """Reads what other nodes lend into a memory, each within a deadline; thread-safe.

    A read that UCX has begun cannot be called off: it was seen to write seconds after its handle
    had been released, and after the other agent had been forgotten. So where one does not come to
    a good end, the agent itself is ended, which does end it, before anybody's `fetch` returns; the
    next one makes a new agent.

    Args:
        memory: where all targets lie.
    Raises:
        TierUnavailable: as of `Agent`.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._agent: Agent | None = Agent(memory)
        self._numbers = itertools.count(1)
        self._asked: deque[_Read | Line] = deque()
        self._lines: dict[int, Line] = {}  # by their descriptors
        self._lent: deque[_Read] = deque()
        self._running: dict[int, _Read] = {}
        self._moved_at = 0.0
        self._closed = False
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._heard = select.epoll()
        self._heard.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="kvstrata-borrow", daemon=True)
        self._thread.start()

    def reaches(self, address: int, nbytes: int) -> bool:
        """Whether it can read into this range."""
        return self._memory.holds(address, nbytes)

    def fetch(self, line: Line, name: bytes, target: int, most: int, deadline: float) -> int:
        """Borrow an object, read it and give it back; its size, 0: not there, -1: it is larger.

        Returns when the bytes are there and were lent all the time, or when none can come any more.

        Args:
            line: to its owner.
            name: the object's.
            target: the address to read to.
            most: how many bytes there is room for.
            deadline: in monotonic seconds.
        Raises:
            OSError, Incompatible, PeerRefused: it failed, or not in time, and so has the line.
        """
        read = _Read(line, name, target, most, deadline, next(self._numbers))
        self._tell(read, line)
        return read.ended.result()

    def hang_up(self, line: Line) -> None:
        """End a line, and what is under way on it."""
        with contextlib.suppress(ConnectionError):
            self._tell(line, line)

    def close(self) -> None:
        """End all, when nothing is under way any more. Repeatable."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.eventfd_write(self._wake, 1)
        self._thread.join()

    def _tell(self, what: _Read | Line, line: Line) -> None:
        with self._lock:
            if not self._closed:
                self._asked.append(what)
                os.eventfd_write(self._wake, 1)
                return
        line.channel.close()
        raise ConnectionError("nothing is borrowed any more")

    def _run(self) -> None:
        while not self._closed or self._asked or any(line.reads for line in self._lines.values()):
            try:
                self._take_in()
                self._begin()
                self._look()
                self._speak()
                self._hear()
            except Exception as error:
                logger.exception("a bug; whatever is borrowed is given up")
                for line in list(self._lines.values()):
                    self._fail(line, error, of_agent=True)
        for line in list(self._lines.values()):
            self._fail(line, ConnectionError("nothing is borrowed any more"))
        self._end_agent()
        self._heard.close()
        with self._lock:  # `close` may yet have to write to it
            os.close(self._wake)

    def _take_in(self) -> None:
        while self._asked:
            what = self._asked.popleft()
            if isinstance(what, Line):
                self._fail(what, ConnectionError("it was hung up"))
                continue
            line = what.line
            if line.error is not None:
                what.ended.set_exception(ConnectionError(str(line.error)))
                continue
            line.used_at = time.monotonic()
            line.reads[what.number] = what
            if line.channel.descriptor not in self._lines:
                self._lines[line.channel.descriptor] = line
                try:
                    self._heard.register(line.channel.descriptor, select.EPOLLIN)
                except OSError as error:  # the system has no more of that
                    self._fail(line, error)
                    continue
            line.words.append(p.Borrow(what.number, what.name, what.most))

    def _begin(self) -> None:
        """Begin to read what is lent, up to the first that is there at once."""
        while self._lent:
            read = self._lent.popleft()
            try:
                if self._agent is None:
                    self._agent = Agent(self._memory)
                number = self._agent.read(read.line.agent, read.address, read.target, read.nbytes)
            except (OSError, TierUnavailable) as error:
                self._fail(read.line, error, of_agent=True)
                return
            self._moved_at = time.monotonic()
            if number is None:
                self._give_back(read)
                return
            self._running[number] = read

    def _look(self) -> None:
        """See which reads are done, and which are late."""
        for number, read in list(self._running.items()):
            if self._running.get(number) is not read:
                continue  # given up
            assert self._agent is not None
            try:
                if self._agent.done(number):
                    self._moved_at = time.monotonic()
                    del self._running[number]
                    self._give_back(read)
            except OSError as error:
                self._fail(read.line, error, of_agent=True)
        now = time.monotonic()
        for line in list(self._lines.values()):
            if any(now >= read.deadline for read in line.reads.values()):
                self._fail(line, TimeoutError("what it lends did not come in time"))

    def _give_back(self, read: _Read) -> None:
        # That it was lent all the time is known once this is answered.
        read.came = True
        read.line.words.append(p.Return(read.number))

    def _speak(self) -> None:
        for line in list(self._lines.values()):
            if line.words:
                words, line.words = line.words, []
                try:
                    line.channel.send(*words)
                except OSError as error:
                    self._fail(line, error)

    def _hear(self) -> None:
        """Hear what others say; waits if there is nothing else to do."""
        timeout: float | None = 0.0
        if not (self._lent or self._running):
            ends = [read.deadline for line in self._lines.values() for read in line.reads.values()]
            if ends:
                timeout = max(0.0, min(ends) - time.monotonic())
            elif not self._closed:
                timeout = None
        heard = self._heard.poll(timeout)
        for descriptor, _ in heard:
            if descriptor == self._wake:
                os.eventfd_read(self._wake)
            elif (line := self._lines.get(descriptor)) is not None:
                self._hear_one(line)
        if not heard and self._running and not self._lent:
            late = time.monotonic() - self._moved_at > SPIN_S
            time.sleep(SLEEP_S if late else 0)

    def _hear_one(self, line: Line) -> None:
        try:
            for body in line.channel.receive():
                if not body:
                    raise ConnectionError("the other end hung up")
                self._answered(line, p.decode_reply(body))
        except (OSError, Incompatible, PeerRefused) as error:
            self._fail(line, error)

    def _answered(self, line: Line, reply: p.Reply) -> None:
        match reply:
            case p.Lent(number, nbytes, address):
                read = line.reads.get(number)
                if read is None or read.nbytes or nbytes > read.most:
                    raise Incompatible(f"it lends {nbytes} bytes that nobody asked for")
                if nbytes <= 0:
                    del line.reads[number]
                    read.ended.set_result(nbytes)
                    return
                read.nbytes, read.address = nbytes, address
                self._lent.append(read)
            case p.Taken(number):
                read = line.reads.get(number)
                if read is None or not read.came:
                    raise Incompatible("it takes back what was not given back")
                del line.reads[number]
                read.ended.set_result(read.nbytes)
            case p.Refused(why):
                raise PeerRefused(f"it refuses: {why[:200]}")
            case other:
                raise Incompatible(f"a {type(other).__name__} out of place")

    def _fail(self, line: Line, error: Exception, *, of_agent: bool = False) -> None:
        """End a line; and the agent, with all that it reads, if it may read for that line."""
        failed = {line: error}
        if of_agent or any(read.line is line for read in self._running.values()):
            self._end_agent()
            for read in self._running.values():
                other = ConnectionError("another read did not end, and the agent is given up")
                failed.setdefault(read.line, other)
            self._running.clear()
        self._lent = deque(read for read in self._lent if read.line not in failed)
        for one, why in failed.items():
            one.error = one.error or why
            if self._lines.get(one.channel.descriptor) is one:
                del self._lines[one.channel.descriptor]
                with contextlib.suppress(OSError):  # it may never have been heard
                    self._heard.unregister(one.channel.descriptor)
            one.channel.close()
            reads, one.reads = one.reads, {}
            for read in reads.values():
                read.ended.set_exception(why)

    def _end_agent(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.end()


class Nixl:
    """A node's two agents: one lends its pool to others, one reads into it.

    Two, so that one that has to be given up takes nothing from those who read here.

    Args:
        pool: all of it.
    Raises:
        TierUnavailable: as of `Agent`.
    """

    def __init__(self, pool: Memory) -> None:
        self.lender = Lender(pool)
        self.borrower = Borrower(pool)

    def close(self) -> None:
        """End both. Repeatable."""
        self.borrower.close()
        self.lender.close()
