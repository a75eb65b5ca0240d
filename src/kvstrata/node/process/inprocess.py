"""A node inside this process, for a library user or a test: the same, on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from kvstrata.config import Config
from kvstrata.node.fleet.membership import Membership
from kvstrata.node.node import Node
from kvstrata.node.process.listening import PeerServer
from kvstrata.node.process.server import Server
from kvstrata.secret import load_secrets
from kvstrata.wire.client import NodeClient


class InProcessNode:
    """Runs a node and its loop in a thread; clients come through socketpairs.

    Args:
        config: the whole configuration; ``node`` plays no part.
        make: builds the node, by default `Node.create`; called on the loop.

    Raises:
        ConfigError: the secret cannot be used, or as ``make`` does.
    """

    node: Node
    server: Server
    peers: PeerServer | None
    """Answers other nodes, if it is configured."""
    fleet: Membership | None
    """Keeps it in its fleet, if it is in one."""

    def __init__(self, config: Config, make: Callable[[Config], Node] = Node.create) -> None:
        self.config = config
        self._known = load_secrets(config.secret_file)
        self._make = make
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="kvstrata-node", daemon=True
        )
        self._thread.start()
        started.result()

    def connect(self) -> NodeClient:
        """A new client of this node."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.run(lambda: self.server.adopt(theirs))
        return NodeClient(ours, self.config.deadlines.attach)

    def run(self, work: Callable[[], Any]) -> Any:
        """Call a function on the node's loop and wait for it, and for what it may await."""

        async def call() -> Any:
            result = work()
            return await result if inspect.isawaitable(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def check_integrity(self) -> None:
        """`Node.check_integrity`, on the loop."""
        self.run(self.node.check_integrity)

    def close(self) -> None:
        """Write behind what is queued and release everything; repeatable."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    def __enter__(self) -> InProcessNode:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        self.node = self._make(self.config)
        self.server = Server(self.node, self._known)
        self.peers = None
        self.fleet = Membership.of(self.node, None)
        try:
            self.peers = PeerServer.of(self.config, self._known, self.node)
            await self.node.start()
            if self.fleet is not None:
                await self.fleet.start()
            started.set_result(None)
            await self._ending.wait()
        finally:
            if self.fleet is not None:
                await self.fleet.stop()
            await self.server.close()
            if self.peers is not None:
                await self.peers.close()
            await self.node.stop()
