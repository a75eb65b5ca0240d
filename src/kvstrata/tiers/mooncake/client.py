"""Mooncake's own client: opened when it is needed, shared by threads, ended when nobody is in it.

The library has rules that it does not enforce. A call into a client that was closed ends the
process, so a client is closed by the last thread that leaves it. Opening and closing one keeps the
interpreter's lock, so a master that is not there is found out first. Its deadlines come from the
environment; what an operator has set there stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.mooncake.codes import NO_ANSWER
from kvstrata.tiers.mooncake.memory import BUFFER_WAIT_S, NEED_NO_REGISTRATION, Memory
from kvstrata.tiers.mooncake.settings import Settings

logger = logging.getLogger(__name__)

REACH_S = 1.0
"""For how long the master's port is tried before the library is asked to talk to it."""
LEAVE_S = 5.0
"""For how long a close waits for the calls under way."""
GIVE_UP_S = 70.0
"""For how long a call of the library takes at most: 60 s for bytes that come drop by drop."""

ENVIRONMENT = {
    "MC_RPC_TIMEOUT_MS": "2000",
    "MC_RPC_CONNECT_TIMEOUT_MS": "1000",
    "MC_HANDSHAKE_CONNECT_TIMEOUT": "2",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "3",
    "MC_TCP_STATUS_TIMEOUT_SEC": "3",
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",
    "MC_STORE_CLIENT_METRIC": "0",
    "MC_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
}
"""What the library is told where its own word would be too long a wait, or too many words."""


def library() -> Any:
    """Mooncake's module.

    Raises:
        TierUnavailable: it is not here; with what to do.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mooncake import store
    except ImportError as error:
        raise TierUnavailable(
            f"Mooncake's library does not load ({error}): pip install 'kvstrata[mooncake]', and "
            "install libibverbs1, libnuma1 and librdmacm1; without CUDA the package is "
            "mooncake-transfer-engine-non-cuda"
        ) from error
    return store


class Open:
    """One client of the library, and what its threads are at: it knows one session of a key."""

    def __init__(self, store: Any, memory: Memory) -> None:
        self.store = store
        self.memory = memory
        self.num_inside = 0
        self.retired = False
        self.closed = threading.Event()
        self._busy: set[str] = set()
        self._freed = threading.Condition()

    @contextmanager
    def alone(self, names: Sequence[str], until: float) -> Iterator[bool]:
        """Have these to oneself; False where others still have them then (monotonic seconds)."""
        with self._freed:
            wait_s = until - time.monotonic()
            alone = self._freed.wait_for(lambda: self._busy.isdisjoint(names), wait_s)
            if alone:
                self._busy.update(names)
        try:
            yield alone
        finally:
            if alone:
                with self._freed:
                    self._busy.difference_update(names)
                    self._freed.notify_all()

    def close(self) -> None:
        """Nobody is in it, and nobody comes any more."""
        self.store.close()
        self.closed.set()


class Client:
    """A node's client of one store; thread-safe.

    Args:
        settings: how it is opened, when it is first used.
    Raises:
        TierUnavailable: the library is not here.
    """

    def __init__(self, settings: Settings) -> None:
        self._library = library()
        self.settings = settings
        self._lock = threading.Lock()
        self._open: Open | None = None
        self._pool: memoryview | None = None
        self._doubt = False  # whether the master gave no answer when it was asked last
        self._closed = False

    def replication(self, copies: int, *, soft: bool = False, hard: bool = False) -> Any:
        """How an object is kept: at best so many copies; pinned softly, or until it is removed."""
        config = self._library.ReplicateConfig()
        config.replica_num = copies
        config.with_hard_pin = hard
        if soft:
            config.soft_pin_action = self._library.SoftPinAction.ENABLE
        return config

    def bind(self, pool: memoryview) -> None:
        """Have this memory registered in every client from now on, where that is needed at all."""
        with self._lock:
            self._pool = pool
            if self._open is not None:
                self._register(self._open, pool)

    @contextmanager
    def use(self) -> Iterator[Open]:
        """The client, opened if need be; it stays open for the time of a ``with``.

        Raises:
            TierUnavailable: it was closed, or the master cannot be reached.
        """
        if self._doubt:
            self._reach()
            self._doubt = False
        with self._lock:
            if self._closed:
                raise TierUnavailable("the tier is closed")
            if self._open is None:
                self._open = self._opened()
                if self._pool is not None:
                    self._register(self._open, self._pool)
            current = self._open
            current.num_inside += 1
        try:
            yield current
        finally:
            self._leave(current)

    def answered(self, codes: Sequence[int]) -> Sequence[int]:
        """The codes of one call, if the master had a part in them.

        Raises:
            TierUnavailable: it gave no answer.
        """
        if not NO_ANSWER.isdisjoint(codes):
            self._doubt = True
            raise TierUnavailable(f"Mooncake's master at {self.settings.master} does not answer")
        return codes

    def renew(self, old: Open) -> None:
        """End a client, and wait until it has ended; the next use opens another one."""
        with self._lock:
            if self._open is old:
                self._open = None
            self._retire(old)
        old.closed.wait(GIVE_UP_S)

    def close(self) -> None:
        """Refuse all uses from now on, and release everything; what is under way comes to its end.

        The last call to come out closes what is left.
        """
        with self._lock:
            self._closed = True
            self._pool = None
            current, self._open = self._open, None
            if current is not None:
                self._retire(current)
        if current is not None:
            current.closed.wait(LEAVE_S)

    def _leave(self, current: Open) -> None:
        with self._lock:
            current.num_inside -= 1
            last = current.retired and not current.num_inside
        if last:
            current.close()

    def _retire(self, current: Open) -> None:
        if not current.retired:
            current.retired = True
            if not current.num_inside:
                current.close()

    def _register(self, current: Open, pool: memoryview) -> None:
        """Register the pool in a thread: a network card pins all of it first."""
        current.num_inside += 1

        def work() -> None:
            try:
                current.memory.register(pool)
            except TierUnavailable as error:
                logger.error("mooncake: %s; all bytes are copied on their way", error)
            finally:
                self._leave(current)

        threading.Thread(target=work, name="kvstrata-mooncake-pool", daemon=True).start()

    def _reach(self) -> str:
        """This machine's address as the master sees it."""
        master = self.settings.master
        try:
            with socket.create_connection((master.host.strip("[]"), master.port), REACH_S) as found:
                return str(found.getsockname()[0])
        except OSError as error:
            raise TierUnavailable(
                f"no Mooncake master at {master}: {error}; start mooncake_master, or correct "
                "mooncake.master"
            ) from error

    def _opened(self) -> Open:
        here, settings = self._reach(), self.settings
        store = self._library.MooncakeDistributedStore()
        code = store.setup(
            f"[{here}]" if ":" in here else here,
            settings.metadata,
            settings.segment_bytes,
            settings.buffer_bytes,
            settings.protocol,
            settings.device,
            str(settings.master),
        )
        if code:
            with contextlib.suppress(Exception):
                store.close()
            raise TierUnavailable(
                f"Mooncake's client does not start (code {code}); the lines before this one, on "
                "stderr, say why"
            )
        buffers = None
        if settings.protocol not in NEED_NO_REGISTRATION:
            # Its own bound beyond `buffer_bytes` would take as much again.
            buffers = self._library.BufferPool(
                store, max_bytes=settings.buffer_bytes, default_timeout=BUFFER_WAIT_S
            )
        return Open(store, Memory(store, buffers))
