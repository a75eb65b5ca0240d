"""One TCP connection between two nodes: frames, and objects from slot to slot.

Bytes go from the kernel into a slot and from a slot into the kernel; Python copies none. Every call
ends within a deadline, or the connection is of no use any more.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvstrata.errors import Incompatible, PeerRefused, TierUnavailable
from kvstrata.secret import Secrets
from kvstrata.transfer import peers as p

_LENGTH = struct.Struct("<I")
_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
AHEAD_BYTES = 256
"""What is taken at once where a frame is to come: most frames are shorter than that."""
RECEIVE_BYTES = 1 << 16
WAKE_BYTES = 1 << 19
KEEPALIVE_S = 20
"""How often the kernel asks a silent connection whether its other end is still there."""


class Address(NamedTuple):
    """Where a node answers others."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: Any) -> Address:
        """The inverse of ``str``.

        Raises:
            ValueError: it is no host and port.
        """
        found = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
        if found is None or not int(found[3]) < 1 << 16:
            raise ValueError(f"{text!r} is no host and port")
        return cls(found[1] or found[2], int(found[3]))


class Channel:
    """A connected socket; of one thread at a time.

    Args:
        connected: a blocking socket, owned from now on.
        timeout_s: as of `begin`.
    """

    def __init__(self, connected: socket.socket, timeout_s: float) -> None:
        self._socket = connected
        self._ahead = b""
        self._wakes_for = 1
        #: what the other end said of itself, once it has proved that it knows a secret
        self.hello: p.Hello | None = None
        self.agent: bytes | None = None
        """Metadata of the other end's NIXL agent, once it has been asked for: for loans alone."""
        self.begin(timeout_s)
        with contextlib.suppress(OSError):  # not of TCP
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)

    def begin(self, timeout_s: float) -> None:
        """All that is sent and received until the next call of this may take so long together."""
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def send(self, message: p.Request | p.Reply, payload: memoryview | None = None) -> None:
        """Send a message, and the bytes that belong to it.

        Raises:
            OSError: the other end has gone, or takes nothing.
        """
        body = p.encode(message)
        # sendall's own deadline is for all of it, which is what is meant.
        self._wait()
        if payload is None:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)
            return
        # The message waits for its bytes, so that the other end is woken once.
        more = 0 if isinstance(self._socket, ssl.SSLSocket) else socket.MSG_MORE
        self._socket.sendall(_LENGTH.pack(len(body)) + body, more)
        self._wait()
        self._socket.sendall(payload)

    def receive(self, rest_s: float | None = None) -> bytes:
        """One frame's body; empty where the other end has hung up between two.

        Args:
            rest_s: if given, the time begins anew with the first byte.
        Raises:
            OSError: the other end has gone, or says nothing.
            Incompatible: a frame that is longer than any.
        """
        if not self._ahead:
            self._wait()
            self._ahead = self._socket.recv(AHEAD_BYTES)
            if not self._ahead:
                return b""
        if rest_s is not None:
            self.begin(rest_s)
        return self._next(length_of(self._next(_LENGTH.size)))

    def receive_into(self, into: memoryview) -> None:
        """Exactly so many bytes, into their place.

        Raises:
            OSError: they did not come, or not in time.
        """
        place = min(len(self._ahead), len(into))
        into[:place], self._ahead = self._ahead[:place], self._ahead[place:]
        while place < len(into):
            self._wake_for(len(into) - place)
            self._wait()
            count = self._socket.recv_into(into[place:])
            if not count:
                raise ConnectionError("the other end hung up in the middle")
            place += count
        self._wake_for(1)

    def close(self) -> None:
        """Hang up. Repeatable."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def on_loop(self) -> LoopChannel:
        """The same connection, for a loop from now on. Whoever has this one closes it.

        Raises:
            Incompatible: the other end has said more than was asked.
        """
        if self._ahead:
            raise Incompatible("it does not wait for its answer")
        return LoopChannel(self._socket)

    def _wake_for(self, nbytes: int) -> None:
        """Have this thread woken for so many bytes, or many, but not for each packet."""
        nbytes = min(nbytes, WAKE_BYTES)
        if nbytes != self._wakes_for and not isinstance(self._socket, ssl.SSLSocket):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
            self._wakes_for = nbytes

    def _next(self, count: int) -> bytes:
        taken = bytearray(count)
        self.receive_into(memoryview(taken))
        return bytes(taken)

    def _wait(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"nothing within {self._timeout_s:g} s")
        self._socket.settimeout(left)


class LoopChannel:
    """A connection that is heard on a loop: frames alone, and no call that waits.

    Args:
        connected: does not block from now on.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._came = bytearray()
        self.descriptor = connected.fileno()

    def receive(self) -> Iterator[bytes]:
        """The bodies of the frames that have come; an empty one where the other end hung up.

        Raises:
            OSError: it has gone.
            Incompatible: a frame that is longer than any.
        """
        hung_up = False
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            while not hung_up:
                data = self._socket.recv(RECEIVE_BYTES)
                self._came += data
                hung_up = not data
                if len(data) < RECEIVE_BYTES and not isinstance(self._socket, ssl.SSLSocket):
                    break
        while len(self._came) >= _LENGTH.size:
            end = _LENGTH.size + length_of(self._came[: _LENGTH.size])
            if len(self._came) < end:
                break
            body = bytes(self._came[_LENGTH.size : end])
            del self._came[:end]
            yield body
        if hung_up:
            yield b""

    def send(self, *messages: p.Request | p.Reply) -> None:
        """Send messages that are shorter together than what a connection holds.

        Raises:
            OSError: the other end has gone, or takes nothing.
        """
        bodies = map(p.encode, messages)
        frames = b"".join(_LENGTH.pack(len(body)) + body for body in bodies)
        if self._socket.send(frames) < len(frames):
            raise ConnectionError("the other end takes nothing")

    def close(self) -> None:
        """Hang up. Repeatable."""
        with contextlib.suppress(OSError):
            self._socket.close()


def length_of(head: bytes | bytearray) -> int:
    """Of the body behind a frame's first four bytes.

    Raises:
        Incompatible: a frame that is longer than any.
    """
    length: int = _LENGTH.unpack(head)[0]
    if length > p.MAX_FRAME_BYTES:
        raise Incompatible(f"a frame of {length} bytes; {p.MAX_FRAME_BYTES} at most")
    return length


def connect(
    address: Address,
    known: Secrets,
    timeout_s: float,
    tls: ssl.SSLContext | None = None,
    ways: Sequence[str] = (),
) -> Channel:
    """A connection to another node, both ends of which have proved that they know a secret.

    Args:
        address: where it answers.
        known: the deployment's secrets, 32 bytes each.
        timeout_s: what connecting and the proof may take together.
        tls: for a network that is not trusted.
        ways: in which bytes can be had here, beside this one.
    Raises:
        OSError: nobody answers.
        PeerRefused, Incompatible: somebody does, and is no node of this deployment and release.
    """
    deadline = time.monotonic() + timeout_s
    connected = socket.create_connection(address, timeout_s)
    try:
        connected.settimeout(max(0.001, deadline - time.monotonic()))
        if tls is not None:
            connected = tls.wrap_socket(connected, server_hostname=address.host)
        channel = Channel(connected, deadline - time.monotonic())
        handshake = p.Handshake(known, ways)
        channel.send(handshake.hello())
        hello = _reply(channel, str(address))
        if not isinstance(hello, p.Hello):
            raise Incompatible(f"{address} does not say hello")
        channel.send(handshake.check_server(hello, str(address)))
        if not isinstance(_reply(channel, str(address)), p.Welcome):
            raise Incompatible(f"{address} does not welcome a node that knows its secret")
        channel.hello = hello
    except BaseException:
        connected.close()
        raise
    return channel


def introduce(channel: Channel, where: str) -> None:
    """Have a connection be one for loans.

    Raises:
        OSError, PeerRefused, Incompatible: as of `ask`.
    """
    agent = ask(channel, p.Introduce(), where)
    if not isinstance(agent, p.Agent):
        raise Incompatible(f"{where} does not say what its NIXL agent is")
    channel.agent = agent.metadata


def ask(channel: Channel, request: p.Request, where: str) -> p.Reply:
    """Send a request and wait for its answer.

    Raises:
        OSError: there is none.
        PeerRefused, Incompatible: another one.
    """
    channel.send(request)
    return _reply(channel, where)


def _reply(channel: Channel, where: str) -> p.Reply:
    body = channel.receive()
    if not body:
        raise ConnectionError("the other end hung up")
    reply = p.decode_reply(body)
    if isinstance(reply, p.Refused):
        raise PeerRefused(f"{where} refuses: {reply.why[:200]}")
    return reply


def unavailable(where: str, error: Exception) -> TierUnavailable:
    """What to say of a peer that failed."""
    words = str(error) or type(error).__name__
    return TierUnavailable(words if words.startswith(where) else f"{where}: {words}")
