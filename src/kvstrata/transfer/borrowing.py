"""Objects of other nodes, read by NIXL: one thread reads them, and hears what is said of them.

One, since an agent does one thing at a time. Who wants an object says so itself: a word wakes its
hearer, often on the core of who said it, and the thread that reads would stand still for that.
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
from dataclasses import dataclass, field

from kvstrata.errors import Incompatible, PeerRefused, TierUnavailable
from kvstrata.transfer import peers as p
from kvstrata.transfer.nixl import Agent, Lender, Memory
from kvstrata.transfer.tcp import Channel

SPIN_S = 0.001
SLEEP_S = 0.00005
AT_ONCE = 4
"""Reads before one listens again: with more of them, who waits for the first waits too long."""
LOOK_S = 0.05
"""How often one looks whether a read is late, or something is to be given back."""

logger = logging.getLogger(__name__)


class Line:
    """A connection to one other node, on which its objects are borrowed.

    Args:
        channel: one for loans; owned from now on.
    """

    def __init__(self, channel: Channel) -> None:
        assert channel.agent is not None
        self.agent = channel.agent
        self.channel = channel.on_loop()
        self.saying = threading.Lock()
        """Of who says something, or closes the channel."""
        self.heard = False
        """Whether a borrower knows of it."""
        self.reads: dict[int, _Read] = {}
        """All that are under way, by the numbers of their loans."""
        self.done: list[p.Return] = []
        """What is yet to be given back."""
        self.done_at = 0.0
        """Since when the first of them waits for that."""
        self.returned: set[int] = set()
        """The loans that the other end has yet to take back."""
        self.error: Exception | None = None
        """Why it has come to its end."""
        self.used_at = time.monotonic()

    def lasts(self, idle_s: float) -> bool:
        """Whether it can be used, and was, within so many seconds."""
        return self.error is None and time.monotonic() - self.used_at < idle_s

    def say(self, *words: p.Request) -> None:
        """Say these words, one after the other.

        Raises:
            OSError: the other end has gone, or hears nothing.
        """
        with self.saying:
            self.channel.send(*words)

    def close(self) -> None:
        """Hang up. Repeatable."""
        with self.saying:  # else the words of another thread might go elsewhere
            self.channel.close()


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
    outcome: int | Exception = 0
    under_way: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.under_way.acquire()

    def end(self, outcome: int | Exception) -> None:
        """Have `wait` return this, or raise it."""
        self.outcome = outcome
        self.under_way.release()

    def wait(self) -> int:
        with self.under_way:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome


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
        self._new: deque[Line] = deque()
        self._ended: deque[tuple[Line, Exception]] = deque()
        self._lines: dict[int, Line] = {}  # by their descriptors
        self._lent: deque[_Read] = deque()
        self._running: dict[int, _Read] = {}
        self._moved_at = 0.0
        self._closed = self._gone = False
        self._waits = False  # until it is woken
        self._lock = threading.Lock()  # of that, and of what requesters and the thread both change
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

        Returns when the bytes are there, and came before the loan could end by this clock; or when
        none can come any more.

        Args:
            line: to its owner.
            name: the object's.
            target: the address to read to.
            most: how many bytes there is room for.
            deadline: in monotonic seconds; no later than a loan ends that is asked for now.
        Raises:
            OSError, Incompatible, PeerRefused: it failed, or not in time, and so has the line.
        """
        deadline = min(deadline, time.monotonic() + p.LOAN_S)
        read = _Read(line, name, target, most, deadline, next(self._numbers))
        with self._lock:
            ended = line.error
            if ended is None and self._closed:
                ended = ConnectionError("nothing is borrowed any more")
                if not line.heard:  # else its end waits for what is under way on it
                    line.error = ended
            if ended is None:
                line.used_at = time.monotonic()
                line.reads[read.number] = read
                done, line.done = line.done, []
                if not line.heard:
                    self._new.append(line)
                if self._waits or not line.heard:
                    self._be_heard()
                line.heard = True
        if ended is not None:
            if line.error is not None:
                line.close()
            raise ConnectionError(str(ended))
        try:
            line.say(*done, p.Borrow(read.number, name, most))
        except OSError as error:
            self._end(line, error)
        return read.wait()

    def hang_up(self, line: Line) -> None:
        """End a line, and what is under way on it."""
        self._end(line, ConnectionError("it was hung up"))

    def close(self) -> None:
        """End all, when nothing is under way any more. Repeatable."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._be_heard()
        self._thread.join()

    def _end(self, line: Line, error: Exception) -> None:
        with self._lock:
            if not self._gone:
                self._ended.append((line, error))
                self._be_heard()
                return
        line.close()

    def _be_heard(self) -> None:
        self._waits = False
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while not self._closed or any(line.reads for line in self._lines.values()) or self._new:
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
        with self._lock:
            self._gone = True
            os.close(self._wake)
        self._take_in()

    def _take_in(self) -> None:
        while self._new:
            line = self._new.popleft()
            if line.error is not None:
                continue  # its descriptor may be another one's by now
            self._lines[line.channel.descriptor] = line
            try:
                self._heard.register(line.channel.descriptor, select.EPOLLIN)
            except OSError as error:  # the system has no more of that
                self._fail(line, error)
        while self._ended:
            self._fail(*self._ended.popleft())

    def _begin(self) -> None:
        """Begin to read what is lent, until some are there that were read at once."""
        ended = 0
        while self._lent and ended < AT_ONCE:
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
                ended += 1
            else:
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
            if any(now >= read.deadline for read in list(line.reads.values())):
                self._fail(line, TimeoutError("what it lends did not come in time"))

    def _give_back(self, read: _Read) -> None:
        line = read.line
        if time.monotonic() >= read.deadline:
            self._fail(line, TimeoutError("what it lends did not come in time"))
            return
        with self._lock:
            del line.reads[read.number]
            if not line.done:
                line.done_at = time.monotonic()
            line.done.append(p.Return(read.number))
        line.returned.add(read.number)
        read.end(read.nbytes)

    def _speak(self) -> None:
        """Give back what nobody says with a word of his own, or not soon."""
        now = time.monotonic()
        for line in list(self._lines.values()):
            with self._lock:
                if not line.done or (line.reads and now - line.done_at < LOOK_S):
                    continue
                done, line.done = line.done, []
            try:
                line.say(*done)
            except OSError as error:
                self._fail(line, error)

    def _hear(self) -> None:
        """Hear what others say; waits if there is nothing else to do."""
        timeout: float | None = 0.0
        if not (self._lent or self._running):
            with self._lock:
                ends = [
                    read.deadline for line in self._lines.values() for read in line.reads.values()
                ]
                self._waits = not (ends or self._new or self._ended or self._closed)
            if ends:
                timeout = max(0.0, min(LOOK_S, min(ends) - time.monotonic()))
            elif self._waits:
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
                    read.end(nbytes)
                    return
                read.nbytes, read.address = nbytes, address
                self._lent.append(read)
            case p.Taken(number):
                if number not in line.returned:
                    raise Incompatible("it takes back what was not given back")
                line.returned.remove(number)
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
            with self._lock:
                one.error = one.error or why
                reads, one.reads = one.reads, {}
            if self._lines.get(one.channel.descriptor) is one:
                del self._lines[one.channel.descriptor]
                with contextlib.suppress(OSError):  # it may never have been heard
                    self._heard.unregister(one.channel.descriptor)
            one.close()
            for read in reads.values():
                read.end(why)

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
