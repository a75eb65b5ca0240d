"""A node inside this process, for a library user or a test: the same node, on a thread of its own."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from kvstrata.client import NodeClient
from kvstrata.config import Config
from kvstrata.node.node import Node
from kvstrata.node.server import Server

R = TypeVar("R")


class InProcessNode:
    """Runs a node and its loop in a thread; clients come through socketpairs.

    Args:
        config: the whole configuration; ``node`` plays no part.
        make: builds the node, by default `Node.create`; called on the loop.
    """

    def __init__(self, config: Config, make: Callable[[Config], Node] = Node.create) -> None:
        self.config = config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kvstrata-node", daemon=True
        )
        self._thread.start()
        try:
            self.node, self.server = self.run(lambda: self._start(make))
        except BaseException:
            self._end_loop()
            raise

    def connect(self) -> NodeClient:
        """A new client of this node."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.run(lambda: self._adopt(theirs))
        return NodeClient(ours, self.config.deadlines.attach)

    def run(self, work: Callable[[], R]) -> R:
        """Call a function on the node's loop and wait for it, and for what it may await."""

        async def call() -> R:
            result = work()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def check_integrity(self) -> None:
        """`Node.check_integrity`, on the loop."""
        self.run(self.node.check_integrity)

    def close(self) -> None:
        """Write behind what is queued and release everything; repeatable."""
        if self._thread.is_alive():
            self.run(lambda: self._stop())
            self._end_loop()

    def __enter__(self) -> InProcessNode:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def _start(self, make: Callable[[Config], Node]) -> tuple[Node, Server]:
        node = make(self.config)
        await node.start()
        return node, Server(node, os.urandom(32))

    async def _adopt(self, connected: socket.socket) -> None:
        self.server.adopt(connected)

    async def _stop(self) -> None:
        self.server.close()
        await self.node.stop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
