"""Bytes between machines by NIXL: RDMA where there is some, TCP or shared memory elsewhere.

The node that has an object lends it: it says where in its pool the object lies, and holds it still.
The other one reads it from there into a slot of its own. The words for that go over the connection
of `kvstrata.transfer.tcp`; what NIXL says between the two proves nothing and is not secured.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvstrata.errors import TierUnavailable

LIBRARIES = ("nixl_cu12", "nixl_cu13", "nixl")
"""What its packages are called; memory of the host needs no CUDA, so any of them will do."""
BACKEND = "UCX"
SPIN_S = 0.001
SLEEP_S = 0.00005
PROGRESS_S = 0.0001
"""How often a lender does its part, and how long a transfer may have to wait for that."""
_MEMORY = "DRAM"

logger = logging.getLogger(__name__)


class Memory:
    """A range of this process's memory.

    Args:
        address: where it begins.
        nbytes: how long it is.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes

    @classmethod
    def of(cls, view: memoryview) -> Memory:
        """That of a view, which has to outlive it."""
        return cls(int(np.frombuffer(view, np.uint8).ctypes.data), view.nbytes)

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether all of that range is in this one."""
        return self.address <= address and address + nbytes <= self.address + self.nbytes


class Agent:
    """One NIXL agent with one memory; thread-safe.

    NIXL's own thread, which never sleeps, is left out: nothing moves but in calls of this class.

    Args:
        memory: registered for as long as the agent lives.
    Raises:
        TierUnavailable: NIXL is not installed, or cannot be used here.
    """

    def __init__(self, memory: Memory) -> None:
        self._library = _library()
        self._running: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._known: dict[bytes, str] = {}
        self._lock = threading.Lock()
        try:
            settings = self._library.nixl_agent_config(
                enable_prog_thread=False,
                backends=[BACKEND],
                sync_mode=self._library.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
            )
            # A name that no agent had before: one that comes back is another one.
            self._agent = self._library.nixl_agent(uuid.uuid4().hex, settings)
            self._agent.register_memory([(memory.address, memory.nbytes, 0, "")], _MEMORY)
            self.metadata: bytes = self._agent.get_agent_metadata()
        except Exception as error:
            raise TierUnavailable(f"NIXL cannot be used here: {error!r}") from error

    def progress(self) -> None:
        """Do what other agents' transfers need of this one.

        Raises:
            OSError: NIXL cannot.
        """
        with _translated():
            self._agent.get_new_notifs()

    def read(self, owner: bytes, source: int, target: int, nbytes: int) -> int | None:
        """Begin to read from another agent's memory; what `done` is to be asked about.

        None: it is done, and need not be asked about, which would wait for other reads that end
        in the call that begins them.

        Args:
            owner: the other agent's metadata.
            source: the address there.
            target: the address here.
            nbytes: how many bytes.
        Raises:
            OSError: the other agent cannot be reached.
        """
        with _translated():
            with self._lock:
                if owner not in self._known:
                    name = self._agent.add_remote_agent(owner)
                    self._known[owner] = name.decode() if isinstance(name, bytes) else name
            here = self._agent.get_xfer_descs([(target, nbytes, 0)], _MEMORY)
            there = self._agent.get_xfer_descs([(source, nbytes, 0)], _MEMORY)
            handle = self._agent.initialize_xfer("READ", here, there, self._known[owner])
            number = next(self._numbers)
            self._running[number] = handle
            return None if self._ended(number, self._agent.transfer(handle)) else number

    def done(self, number: int) -> bool:
        """Whether a read has come to its end.

        Raises:
            OSError: it failed.
        """
        with _translated():
            return self._ended(number, self._agent.check_xfer_state(self._running[number]))

    def _ended(self, number: int, state: str) -> bool:
        if state == "ERR":
            raise ConnectionError("NIXL could not read")
        if state == "DONE":
            self._agent.release_xfer_handle(self._running.pop(number))
        return state == "DONE"

    def end(self) -> None:
        """Be gone: whatever was under way moves no byte any more. Nobody may be in a call."""
        for handle in self._running.values():
            with contextlib.suppress(Exception):
                self._agent.release_xfer_handle(handle)
            handle._agent = None
        self._running.clear()
        self._agent = None


class Lender:
    """Lets other agents read a memory; what that takes here a thread does while something is lent.

    Args:
        memory: of which all that is lent is a part.
    Raises:
        TierUnavailable: as of `Agent`.
    """

    def __init__(self, memory: Memory) -> None:
        self._agent = Agent(memory)
        self.metadata = self._agent.metadata
        self._changed = threading.Condition()
        self._num_loans = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvstrata-lend", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """Something is lent meanwhile."""
        with self._changed:
            self._num_loans += 1
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._num_loans -= 1

    def close(self) -> None:
        """Lend nothing any more. Repeatable."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._num_loans or self._closed)
                if self._closed:
                    break
            try:
                self._agent.progress()
            except OSError as error:
                logger.warning("lending: %s", error)
                time.sleep(1.0)
            time.sleep(PROGRESS_S)
        self._agent.end()


class Reader:
    """Reads from other agents' memory, within a deadline.

    A read that UCX has begun cannot be called off: it was seen to write seconds after its handle
    had been released, and after the other agent had been forgotten. So where one does not come to
    a good end, the agent itself is ended, which does end it, before anybody's `pull` returns; the
    next one makes a new agent.

    Args:
        memory: where all targets lie.
    Raises:
        TierUnavailable: as of `Agent`.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._changed = threading.Condition()
        self._agent: Agent | None = Agent(memory)
        self._num_users = 0
        self._ending = False

    def reaches(self, address: int, nbytes: int) -> bool:
        """Whether it can read into this range."""
        return self._memory.holds(address, nbytes)

    def pull(self, owner: bytes, source: int, target: int, nbytes: int, deadline: float) -> None:
        """Read, and return when the bytes are there, or when none can come any more.

        Args:
            owner, source, target, nbytes: as of `Agent.read`.
            deadline: in monotonic seconds.
        Raises:
            OSError: it failed, or not in time.
        """
        with self._using(deadline) as agent:
            begun, number = time.monotonic(), agent.read(owner, source, target, nbytes)
            while number is not None and not agent.done(number):
                now = time.monotonic()
                if now >= deadline:
                    raise TimeoutError("NIXL brought nothing in time")
                if self._ending:
                    raise ConnectionError("another read did not end, and the agent is given up")
                if now - begun > SPIN_S:
                    time.sleep(SLEEP_S)

    def close(self) -> None:
        """End the agent when nobody uses it any more. Repeatable."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_users)
            agent, self._agent = self._agent, None
        if agent is not None:
            agent.end()

    @contextlib.contextmanager
    def _using(self, deadline: float) -> Iterator[Agent]:
        with self._changed:
            left = deadline - time.monotonic()
            if not self._changed.wait_for(lambda: not self._ending, max(0.0, left)):
                raise TimeoutError("the NIXL agent is being given up")
            if self._agent is None:
                try:
                    self._agent = Agent(self._memory)
                except TierUnavailable as error:
                    raise ConnectionError(str(error)) from error
            agent = self._agent
            self._num_users += 1
        try:
            yield agent
        except BaseException:
            self._leave(failed=True)
            raise
        self._leave(failed=False)

    def _leave(self, *, failed: bool) -> None:
        with self._changed:
            self._num_users -= 1
            self._ending = self._ending or failed
            if not self._ending:
                self._changed.notify_all()
                return
            if not self._num_users:
                assert self._agent is not None
                self._agent.end()
                self._agent, self._ending = None, False
                self._changed.notify_all()
            elif failed:
                ended = self._agent
                self._changed.wait_for(lambda: self._agent is not ended)


class Nixl:
    """A node's two agents: one lends its pool to others, one reads into it.

    Two, so that a reader that has to be given up takes nothing from those who read here.

    Args:
        pool: all of it.
    Raises:
        TierUnavailable: as of `Agent`.
    """

    def __init__(self, pool: Memory) -> None:
        self.lender = Lender(pool)
        self.reader = Reader(pool)

    def close(self) -> None:
        """End both. Repeatable."""
        self.reader.close()
        self.lender.close()


def _library() -> Any:
    # Beside a system's own libefa (Debian: ibverbs-providers) the wheel's libraries end every
    # process with a segmentation fault. Who has EFA sets UCX_MODULES himself.
    os.environ.setdefault("UCX_MODULES", "^efa")
    missing: list[str] = []
    for name in LIBRARIES:
        try:
            found = importlib.import_module(name)
        except ImportError as error:
            missing.append(str(error))
            continue
        # It prints its log to standard output otherwise.
        log = logging.getLogger("nixl")
        log.handlers.clear()
        log.propagate = True
        log.setLevel(logging.WARNING)
        return found
    raise TierUnavailable(f"NIXL is not here: pip install 'kvstrata[nixl]' ({'; '.join(missing)})")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # its errors have no common class
        raise ConnectionError(f"NIXL: {error!r}") from error
