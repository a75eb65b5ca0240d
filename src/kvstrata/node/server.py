"""A node behind a Unix socket: who may connect, what they are told, and when they are gone.

Each connection belongs to a process, watched through a pidfd. A connection's leases and
reservations end when it says ``bye`` or when its process is dead, not when its socket closes: a
copy may outlive its socket, and a forked child may keep a dead process's socket open.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import cast

import kvstrata
from kvstrata.errors import Incompatible, KVStrataError
from kvstrata.node import protocol as p
from kvstrata.node.leases import Client
from kvstrata.node.node import Node

logger = logging.getLogger(__name__)

SO_PEERPIDFD = 77  # Linux 6.5; Python has no name for it yet
STARTUP_GRACE_S = 60.0


class Peer:
    """A client process: its connections, and what connections that ended without a word still hold."""

    def __init__(self, pid: int, pidfd: int | None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.connections: set[Connection] = set()
        self.orphans: list[Client] = []


class Connection(asyncio.Protocol):
    """One client's socket on the node's loop."""

    def __init__(self, server: Server, peer: Peer) -> None:
        self.client = Client(f"pid {peer.pid}")
        self.peer = peer
        self._server = server
        self._frames = p.Frames()
        self._transport: asyncio.Transport | None = None
        self._said_bye = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._answer(p.decode_request(body))
        except Incompatible as error:
            logger.error("%s is disconnected: %s", self.client.name, error)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._server.disconnected(self, self._said_bye)

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def _answer(self, message: p.Request) -> None:
        if isinstance(message, p.Bye):
            self._said_bye = True
            self._server.node.end(self.client)
            return
        number: int = getattr(message, "id", 0)
        try:
            answer = self._server.node.handle(self.client, message)
        except KVStrataError as error:
            self._send(p.Failed(number, type(error).__name__, str(error)))
            return
        if inspect.isawaitable(answer):
            task = asyncio.ensure_future(answer)
            self._server.pending.add(task)
            task.add_done_callback(lambda done: self._settle(number, done))
        elif answer is not None:
            self._send(answer)

    def _settle(self, number: int, done: asyncio.Future[p.Reply]) -> None:
        self._server.pending.discard(done)
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._send(done.result())
        else:
            if not isinstance(error, KVStrataError):
                logger.error("a request died of a bug", exc_info=error)
            self._send(p.Failed(number, type(error).__name__, str(error)))

    def _send(self, reply: p.Reply) -> None:
        if self._transport is not None:
            self._transport.write(p.encode(reply))


class Server:
    """Accepts clients of a node, and ends their holdings when they are gone.

    Args:
        node: the node to serve.
        secret: the deployment's secret, handed to clients.
        on_alone: called when the last client process has gone.
    """

    def __init__(
        self, node: Node, secret: bytes, on_alone: Callable[[], None] = lambda: None
    ) -> None:
        self.node = node
        self.pending: set[asyncio.Future[p.Reply]] = set()
        self._secret = secret
        self._on_alone = on_alone
        self._identity = os.urandom(16)
        self._peers: dict[int, Peer] = {}
        self._listener: socket.socket | None = None
        self._connecting: set[asyncio.Task[None]] = set()

    @property
    def num_peers(self) -> int:
        """Client processes that are alive and connected, or whose copies may still run."""
        return len(self._peers)

    def listen(self, listener: socket.socket) -> None:
        """Serve a bound, listening Unix socket."""
        listener.setblocking(False)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def adopt(self, connected: socket.socket) -> None:
        """Serve a client that is connected already: one end of a socketpair."""
        self._welcome(connected)

    def close(self) -> None:
        """Stop listening and hang up on everybody."""
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for peer in list(self._peers.values()):
            for connection in list(peer.connections):
                connection.close()
            self._forget(peer)

    def disconnected(self, connection: Connection, said_bye: bool) -> None:
        """A socket has closed."""
        peer = connection.peer
        peer.connections.discard(connection)
        if not said_bye and peer.pidfd is not None:
            peer.orphans.append(connection.client)
        else:
            self.node.end(connection.client)
        if not peer.connections and not any(c.leases or c.reservations for c in peer.orphans):
            self._forget(peer)

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connected, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                logger.error("cannot accept a client: %s", error)
                return
            self._welcome(connected)

    def _welcome(self, connected: socket.socket) -> None:
        pid, uid, _ = struct.unpack(
            "3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        if uid not in (os.getuid(), 0):
            logger.warning("refused a client of user %d", uid)
            connected.close()
            return
        hello = p.Hello(
            p.PROTOCOL_VERSION,
            kvstrata.__version__,
            os.getpid(),
            self._identity,
            self.node.host.pool.capacity_bytes,
            self._secret,
        )
        try:
            socket.send_fds(connected, [p.encode(hello)], [self.node.host.pool.fd])
        except OSError as error:
            logger.warning("pid %d left before it was welcomed: %s", pid, error)
            connected.close()
            return
        peer = self._peers.get(pid)
        if peer is None:
            peer = self._peers[pid] = Peer(pid, _pidfd(connected, pid))
            if peer.pidfd is not None:
                loop = asyncio.get_running_loop()
                loop.add_reader(peer.pidfd, self._died, peer)
        connection = Connection(self, peer)
        peer.connections.add(connection)
        connected.setblocking(False)
        task = asyncio.ensure_future(self._connect(connection, connected))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: Connection, connected: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: connection, connected)
        except OSError:
            connected.close()
            self.disconnected(connection, said_bye=True)

    def _died(self, peer: Peer) -> None:
        logger.info("client pid %d is gone", peer.pid)
        for client in peer.orphans:
            self.node.end(client)
        peer.orphans.clear()
        for connection in list(peer.connections):
            self.node.end(connection.client)
            connection.close()
        self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        if self._peers.get(peer.pid) is not peer:
            return
        del self._peers[peer.pid]
        if peer.pidfd is not None:
            asyncio.get_running_loop().remove_reader(peer.pidfd)
            os.close(peer.pidfd)
            peer.pidfd = None
        for client in peer.orphans:
            self.node.end(client)
        peer.orphans.clear()
        if not self._peers:
            self._on_alone()


def _pidfd(connected: socket.socket, pid: int) -> int | None:
    """A descriptor that becomes readable when the peer's process is dead; None if none can be had."""
    try:
        return connected.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        pass
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno != errno.ESRCH:
            logger.warning(
                "pid %d cannot be watched (%s); its closed socket will count as its death",
                pid, error,
            )  # fmt: skip
        return None

