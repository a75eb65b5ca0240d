"""A connection to a node: whole messages both ways over a socket that never blocks.

What is sent waits here for a node that is slow to take it; what has come is taken by whoever asks.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time

from kvstrata.errors import Incompatible, NodeUnavailable
from kvstrata.wire import protocol as p

RECEIVE_BYTES = 1 << 20
# What may wait here for a node that takes no messages, before it counts as gone for new ones.
MAX_UNSENT_BYTES = 1 << 20
CLOSE_S = 0.25
# What is never refused: a lease or reservation that is not given back is held for good.
_GIVES_BACK = (p.Release, p.Commit, p.Bye)

_IN_AND_OUT = select.POLLIN | select.POLLOUT


class Connection:
    """Sends from any thread; one thread at a time receives.

    Args:
        connected: a connected Unix socket whose other end is a node; owned from now on.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._frames = p.Frames()
        self._sending = threading.Lock()
        self._unsent = bytearray()
        self._pid = os.getpid()
        #: why there is no connection any more; None: it stands, as far as is known
        self.lost: str | None = None
        self._poll = select.poll()
        connected.setblocking(False)
        self._poll.register(connected, select.POLLIN)

    @property
    def num_unsent(self) -> int:
        """Bytes that wait for the node to take them."""
        return len(self._unsent)

    def greet(self, timeout_s: float) -> tuple[p.Hello, int]:
        """The node's first frame, and the pool's descriptor that comes with it, to be closed.

        Raises:
            NodeUnavailable: nobody answered, or the other end hung up.
            Incompatible: the node speaks another version.
        """
        deadline = time.monotonic() + timeout_s
        fds: list[int] = []
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or not self._poll.poll(left * 1e3):
                    raise NodeUnavailable("the node says nothing")
                try:
                    data, got, _, _ = socket.recv_fds(self._socket, 4096, 4)
                except OSError as error:
                    raise NodeUnavailable(f"the node is gone: {error}") from error
                fds += got
                if not data:
                    raise NodeUnavailable("the node hung up")
                for body in self._frames.feed(data):
                    hello = p.decode_hello(body)
                    if len(fds) != 1:
                        raise Incompatible("the node sent no pool with its hello")
                    return hello, fds.pop()
        finally:
            for fd in fds:
                os.close(fd)

    def send(self, message: p.Request) -> None:
        """Send one message, or queue it; does not wait.

        Raises:
            NodeUnavailable: the node has gone, or has taken nothing for too many messages.
            UsageError: the message is longer than one may be.
        """
        if self._pid != os.getpid():
            raise NodeUnavailable("a forked process must connect to the node itself")
        with self._sending:
            if self.lost is not None:
                raise NodeUnavailable(self.lost)
            if len(self._unsent) > MAX_UNSENT_BYTES:
                self._flush_locked()
            if len(self._unsent) > MAX_UNSENT_BYTES and not isinstance(message, _GIVES_BACK):
                raise NodeUnavailable("the node takes no messages")
            self._unsent += p.encode(message)
            self._flush_locked()
        if self.lost is not None:
            raise NodeUnavailable(self.lost)

    def flush(self) -> None:
        """Send what waits and the node takes now."""
        with self._sending:
            self._flush_locked()

    def receive(self, timeout_s: float) -> list[p.Reply] | None:
        """What has come, waiting for it this long; None if nothing has."""
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                if self._unsent:
                    self.flush()
                # poll() rounds up to whole milliseconds, so an answer may be that late.
                left = max(0.0, deadline - time.monotonic())
                self._poll.modify(self._socket, _IN_AND_OUT if self._unsent else select.POLLIN)
                events = self._poll.poll(left * 1e3)
                if not events:
                    return None
                if events[0][1] != select.POLLOUT:
                    break
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except (OSError, ValueError) as error:
            self.lose(f"the node is gone: {error}")
            return []
        if not data:
            self.lose("the node hung up")
            return []
        try:
            return [p.decode_reply(body) for body in self._frames.feed(data)]
        except Incompatible as error:
            self.lose(str(error))
            return []

    def hang_up(self) -> None:
        """Say that no copy is under way, and close. Repeatable; never raises.

        The node closes first, for a while: an answer of its that met a closed end would end the
        connection before it has read these last words, and what was held here would stay held.
        """
        if self.lost is None and self._pid == os.getpid():
            deadline = time.monotonic() + CLOSE_S
            with contextlib.suppress(NodeUnavailable, OSError, ValueError):
                self.send(p.Bye())
                # select() knows no descriptors beyond 1023, and an engine may have as many
                ready = select.poll()
                ready.register(self._socket, select.POLLOUT)
                while self._unsent and (left := deadline - time.monotonic()) > 0:
                    ready.poll(left * 1e3)
                    self.flush()
                ready.modify(self._socket, select.POLLIN)
                while (left := deadline - time.monotonic()) > 0:
                    ready.poll(left * 1e3)
                    with contextlib.suppress(BlockingIOError):  # another thread took it
                        if not self._socket.recv(RECEIVE_BYTES):
                            break
        self.lose("this client was closed")

    def lose(self, why: str) -> None:
        """Take the node for gone. Repeatable: the first reason stays."""
        if self.lost is None:
            self.lost = why
            if self._pid == os.getpid():
                # A thread that waits for an answer hears of it; close alone would not tell it.
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _flush_locked(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            self.lose(f"the node is gone: {error}")
