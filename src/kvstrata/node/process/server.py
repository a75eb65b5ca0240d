"""A node behind a Unix socket: who may connect, what they are told, and when they are gone.

Each connection belongs to a process, watched through a pidfd. A connection's leases and
reservations end when it says ``bye`` or when its process is dead, not when its socket closes: a
copy may outlive its socket, and a forked child may keep a dead process's socket open.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

import kvstrata
from kvstrata.errors import Incompatible, KVStrataError, UsageError
from kvstrata.node.common.background import Tasks, report_bug
from kvstrata.node.common.slices import HOLD_S
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client, Holder
from kvstrata.secret import Secrets
from kvstrata.wire import protocol as p

logger = logging.getLogger(__name__)

SO_PEERPIDFD = 77  # Linux 6.5; Python has no name for it yet
UNKNOWN_TO_THE_KERNEL = (errno.ENOSYS, errno.EINVAL, errno.ENOPROTOOPT)
ACCEPT_AGAIN_S = 1.0
MAX_WHY_CHARS = 1000
"""Of a refusal: it may quote what was asked for, which may be as long as a frame."""
MAX_LATE = 256
MAX_LATE_BYTES = 8 << 20
"""Of one connection's requests whose answers are under way: until some are done no more are taken.

All of these end by themselves. A wait for a lease may need the release that comes behind it, so it
holds nothing up: of those there may be `MAX_AWAITS`, and more are refused.
"""
MAX_AWAITS = 4096


class Connection(asyncio.Protocol):
    """One client's socket on the node's loop, and its process.

    Args:
        server: whose client this is.
        pid: the process, for the log.
        pidfd: becomes readable when that process is dead; None if it cannot be watched. Owned.
        holder: what all connections of that process hold.
    """

    def __init__(self, server: Server, pid: int, pidfd: int | None, holder: Holder) -> None:
        self.client = Client(f"pid {pid}", holder)
        self.pid = pid
        self.pidfd = pidfd
        self._server = server
        self._frames = p.Frames()
        self._bodies: deque[bytes] = deque()  # of requests that have come and wait for their turn
        self._transport: asyncio.Transport | None = None
        self._full = False  # of answers that the client has not read
        self._going_on = False
        self._num_late = self._late_bytes = 0  # of requests whose answers are under way
        self._waits: set[asyncio.Task[None]] = set()  # that change nothing: somebody looks on
        self._num_awaits = 0
        self._lost = self._closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's
        self._transport = cast(asyncio.Transport, transport)
        if self._closed:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._bodies.extend(self._frames.feed(data))
            self._answer_some()
        except Incompatible as error:
            self._disconnect(error)

    def pause_writing(self) -> None:
        # A client that reads no answers may ask nothing more until it does.
        self._full = True
        self._read_or_not()

    def resume_writing(self) -> None:
        self._full = False
        self._go_on()

    def connection_lost(self, error: Exception | None) -> None:
        # What it had asked for counts, such as a commit before its end; it needs no answers.
        self._transport = None
        self._lost, self._full = True, False
        for wait in self._waits:
            # Not at once: what has not begun would never be awaited.
            asyncio.get_running_loop().call_soon(wait.cancel)
        self._go_on()

    def close(self) -> None:
        """Hang up."""
        self._closed = True
        self._bodies.clear()
        if self._transport is not None:
            self._transport.abort()
        elif self._lost:
            self._server.disconnected(self)

    @property
    def _stopped(self) -> bool:
        """Whether nothing more is taken from this client for now."""
        return self._full or self._num_late >= MAX_LATE or self._late_bytes >= MAX_LATE_BYTES

    def _answer_some(self) -> None:
        """Answer what has come, until the others on the loop shall have their turn.

        Raises:
            Incompatible: it was no request.
        """
        stop = time.perf_counter() + HOLD_S
        while self._bodies and not self._stopped:
            body = self._bodies.popleft()
            self._answer(p.decode_request(body), len(body))
            if time.perf_counter() >= stop:
                break
        if self._bodies and not self._stopped:
            self._go_on_soon()
        self._read_or_not()
        if self._lost and not self._bodies:
            self._server.disconnected(self)

    def _go_on_soon(self) -> None:
        if not self._going_on:
            self._going_on = True
            asyncio.get_running_loop().call_soon(self._have_turn)

    def _have_turn(self) -> None:
        self._going_on = False
        self._go_on()

    def _go_on(self) -> None:
        try:
            self._answer_some()
        except Incompatible as error:
            self._disconnect(error)

    def _read_or_not(self) -> None:
        """Read on once all that has come is answered, and the answers are on their way."""
        if self._transport is None or self._closed:
            return
        if self._bodies or self._stopped:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _disconnect(self, error: Incompatible) -> None:
        logger.error("%s is disconnected: %s", self.client.name, error)
        self._server.counters.add("disconnects_total", why="garbage")
        self.close()

    def _answer(self, message: p.Request, nbytes: int) -> None:
        if isinstance(message, p.Bye):
            self._server.node.end(self.client)
            self.close()
            return
        if self._lost and isinstance(message, (p.Await, p.Watch)):
            return
        number: int = getattr(message, "id", 0)
        try:
            if isinstance(message, p.Await) and self._num_awaits >= MAX_AWAITS:
                raise UsageError(f"{MAX_AWAITS} wait for leases on this connection already")
            answer = self._server.node.handle(self.client, message)
            if isinstance(answer, Awaitable):
                self._begin(number, message, nbytes, answer)
            elif answer is not None:
                self._send(answer)
        except Exception as error:
            self._refuse(number, message, error)

    def _begin(
        self, number: int, message: p.Request, nbytes: int, answer: Awaitable[p.Reply]
    ) -> None:
        """Let an answer be under way, and count it until it is done."""
        late = self._answer_later(number, message, answer)
        task = self._server.tasks.spawn("a request", late)
        awaits = isinstance(message, p.Await)

        def count(sign: int) -> None:
            self._num_awaits += sign * awaits
            self._num_late += sign * (not awaits)
            self._late_bytes += sign * (not awaits) * nbytes

        def done(task: asyncio.Task[None]) -> None:
            self._waits.discard(task)
            stopped = self._stopped
            count(-1)
            if stopped and not self._stopped:
                self._go_on_soon()

        count(1)
        if isinstance(message, (p.Await, p.Watch)):
            self._waits.add(task)
        task.add_done_callback(done)

    async def _answer_later(
        self, number: int, message: p.Request, answer: Awaitable[p.Reply]
    ) -> None:
        try:
            self._send(await answer)
        except Exception as error:
            self._refuse(number, message, error)

    def _refuse(self, number: int, message: p.Request, error: Exception) -> None:
        what, why = type(message).__name__.lower(), str(error)[:MAX_WHY_CHARS]
        if isinstance(error, KVStrataError):
            logger.warning("%s: %s is refused: %s", self.client.name, what, why)
            self._server.counters.add("requests_refused_total", request=what)
        else:
            report_bug(self._server.counters, f"a {what}", error)
        if number:
            self._send(p.Failed(number, type(error).__name__, why))

    def _send(self, reply: p.Reply) -> None:
        if self._transport is not None:
            self._transport.write(p.encode(reply))


class Server:
    """Accepts clients of a node, and ends their holdings when they are gone.

    Args:
        node: the node to serve.
        known: the deployment's secrets, handed to clients.
        on_alone: called whenever the last client has gone.
    """

    def __init__(
        self, node: Node, known: Secrets, on_alone: Callable[[], None] = lambda: None
    ) -> None:
        self.node = node
        self.counters = node.counters
        self.tasks = Tasks(node.counters)
        self._known = known
        self._on_alone = on_alone
        self._identity = os.urandom(16)
        self._connections: set[Connection] = set()
        self.beside: set[int] = set()
        """Processes that belong to this node: it serves them, and does not stay for them."""
        self._listener: socket.socket | None = None

    @property
    def num_clients(self) -> int:
        """Connections that stand, and those of living processes whose copies may still run."""
        return sum(one.pid not in self.beside for one in self._connections)

    def listen(self, listener: socket.socket) -> None:
        """Serve a bound, listening Unix socket."""
        listener.setblocking(False)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self.accept)

    def adopt(self, connected: socket.socket) -> None:
        """Serve a client that is connected already: one end of a socketpair."""
        self._welcome(connected)

    def accept(self) -> None:
        """Welcome those who wait at the door."""
        while self._listener is not None:
            try:
                connected, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors, most likely: the socket stays readable, so wait a while.
                logger.error("cannot accept a client: %s", error)
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._listener)
                loop.call_later(ACCEPT_AGAIN_S, self._listen_again)
                return
            self._welcome(connected)

    def stop_listening(self) -> None:
        """Take no more clients. Repeatable."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def close(self) -> None:
        """Stop listening and hang up on everybody. Repeatable."""
        self.stop_listening()
        for connection in list(self._connections):
            connection.close()
            self._forget(connection)
        await asyncio.sleep(0)  # a task that has not begun would not close its socket
        await self.tasks.cancel()

    def disconnected(self, connection: Connection) -> None:
        """A socket has closed; what its process may still be copying stays held."""
        if connection.pidfd is None or not connection.client.holds_something:
            self._forget(connection)

    def _listen_again(self) -> None:
        if self._listener is not None:
            self.listen(self._listener)

    def _welcome(self, connected: socket.socket) -> None:
        pid, uid, _ = struct.unpack(
            "3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        if uid not in (os.getuid(), 0):
            logger.warning("refused a client of user %d", uid)
            connected.close()
            return
        try:
            pidfd = _pidfd(connected, pid)
        except OSError as error:
            if not isinstance(error, ProcessLookupError):
                # Its leases would never end, or would end with its socket while a copy still runs.
                logger.error("pid %d cannot be watched, and is refused: %s", pid, error)
                self.counters.add("disconnects_total", why="unwatched")
            connected.close()
            return
        try:
            hello = p.Hello(
                p.PROTOCOL_VERSION,
                kvstrata.__version__,
                os.getpid(),
                self._identity,
                self.node.host.pool.capacity_bytes,
                list(self._known),
                [backing.name for backing in self.node.backings],
                self.node.address,
            )
            connected.setblocking(False)
            socket.send_fds(connected, [p.encode(hello)], [self.node.host.pool.fd])
        except OSError as error:
            logger.warning("pid %d left before it was welcomed: %s", pid, error)
            connected.close()
            if pidfd is not None:
                os.close(pidfd)
            return
        known = [one.client.holder for one in self._connections if one.pid == pid]
        connection = Connection(self, pid, pidfd, known[0] if known else Holder())
        self._connections.add(connection)
        if pidfd is not None:
            asyncio.get_running_loop().add_reader(pidfd, self._died, connection)
        self.tasks.spawn("a connection", self._connect(connection, connected))

    async def _connect(self, connection: Connection, connected: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: connection, connected)
        except BaseException as error:
            connected.close()
            self._forget(connection)
            if not isinstance(error, OSError):
                raise

    def _died(self, connection: Connection) -> None:
        logger.info("client %s is dead", connection.client.name)
        connection.close()
        self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        if connection.pidfd is not None:
            asyncio.get_running_loop().remove_reader(connection.pidfd)
            os.close(connection.pidfd)
        self.node.end(connection.client)
        if connection.pid not in self.beside and not self.num_clients:
            self._on_alone()


def _pidfd(connected: socket.socket, pid: int) -> int | None:
    """A descriptor that becomes readable when the peer's process is dead; None if none can be had.

    None can be had of a kernel that knows no such thing; any other failure is one.

    Raises:
        OSError: it is dead already, or descriptors or rights are lacking.
    """
    try:
        return connected.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno not in UNKNOWN_TO_THE_KERNEL:
            raise
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in UNKNOWN_TO_THE_KERNEL:
            raise
        logger.warning(
            "pid %d cannot be watched (%s); its closed socket will count as its death", pid, error
        )
        return None
