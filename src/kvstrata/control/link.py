"""The API's line to its node: one connection, made anew when the node is back.

Answers are waited for in threads, a bounded number of them. What changes much or waits long has
threads of its own, so that it keeps nobody from looking.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from kvstrata.config import Config
from kvstrata.errors import Busy, KVStrataError, NodeUnavailable
from kvstrata.wire.client import NodeClient
from kvstrata.wire.launch import connect
from kvstrata.wire.sockets import socket_path

T = TypeVar("T")

ANSWER_S = 5.0
"""For a look, and for the node's first word."""
LONG_S = 60.0
"""For a verb that has much to do."""
THREADS = 8
LONG_THREADS = 8
MAX_WAITING = 128
"""Calls in each lane, those at work included."""
TRY_AGAIN_S = 0.25
"""How long a node that did not answer counts as gone without another try."""


class Lane:
    """Threads of one kind of call, and how many may wait for them."""

    def __init__(self, name: str, num_threads: int) -> None:
        self.threads = ThreadPoolExecutor(num_threads, f"kvstrata-api-{name}")
        self.under_way = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Call in a thread and wait.

        Raises:
            Busy: too many wait already.
        """
        if self.under_way >= MAX_WAITING:
            raise Busy(f"{MAX_WAITING} calls wait for the node; try again")
        self.under_way += 1
        future = asyncio.get_running_loop().run_in_executor(self.threads, work)
        # Who is gone leaves a thread that still waits: it counts until it is back.
        future.add_done_callback(self._ended)
        return await asyncio.shield(future)

    def _ended(self, future: asyncio.Future[T]) -> None:
        self.under_way -= 1
        if not future.cancelled():
            future.exception()  # nobody may be left to look at it


class NodeLink:
    """Reaches the node that a configuration names; never starts one.

    Args:
        config: ``node`` says which.
    """

    def __init__(self, config: Config) -> None:
        self.path = socket_path(config)
        self._config = replace(config, node=f"unix:{self.path}")
        self._lock = threading.Lock()
        self._client: NodeClient | None = None
        self._failed: KVStrataError | None = None
        self._tried_at = 0.0
        self._quick = Lane("quick", THREADS)
        self._long = Lane("long", LONG_THREADS)

    async def ask(self, work: Callable[[NodeClient], T], *, long: bool = False) -> T:
        """What ``work`` makes of the node; it runs in a thread, and twice if the node was replaced.

        Raises:
            NodeUnavailable: no node answers.
            Incompatible: it speaks another version.
            Busy: too much waits already.
            KVStrataError: as ``work`` does.
        """
        return await (self._long if long else self._quick).run(lambda: self._ask(work))

    def close(self) -> None:
        """Hang up. Repeatable."""
        for lane in (self._quick, self._long):
            lane.threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._client is not None:
                self._client.close()

    def _ask(self, work: Callable[[NodeClient], T]) -> T:
        client, fresh = self._attached()
        try:
            return work(client)
        except NodeUnavailable:
            if fresh:
                raise
        # That connection was to a node that has gone; perhaps another one is there.
        client, _ = self._attached()
        return work(client)

    def _attached(self) -> tuple[NodeClient, bool]:
        """A connection, and whether it was made just now."""
        with self._lock:
            if self._client is not None and self._client.alive:
                return self._client, False
            if self._failed is not None and time.monotonic() < self._tried_at + TRY_AGAIN_S:
                raise type(self._failed)(str(self._failed))
            if self._client is not None:
                self._client.close()
                self._client = None
            try:
                self._client = connect(self._config, ANSWER_S)
            except KVStrataError as error:
                self._failed, self._tried_at = error, time.monotonic()
                raise
            self._failed = None
            return self._client, True
