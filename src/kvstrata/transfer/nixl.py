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
import queue
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
PROGRESS_S = 0.0003
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
        self._num_loans = 0
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvstrata-lend", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """One thing more is lent. Never blocks; this and `end` are called by one thread alone."""
        self._num_loans += 1
        if self._num_loans == 1:
            self._wake.put(None)

    def end(self) -> None:
        """It is lent no more."""
        self._num_loans -= 1

    def close(self) -> None:
        """Lend nothing any more. Repeatable."""
        self._closed = True
        self._wake.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._wake.get()
            while self._num_loans and not self._closed:
                # Many a loan has ended by then, and needed nothing.
                time.sleep(PROGRESS_S)
                try:
                    self._agent.progress()
                except OSError as error:
                    logger.warning("lending: %s", error)
                    time.sleep(1.0)
        self._agent.end()


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
