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
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import xxhash

from kvstrata.brought import Brought
from kvstrata.errors import Incompatible, PeerRefused, TierUnavailable
from kvstrata.objects import HEADER_BYTES, payload_end
from kvstrata.secret import Secrets
from kvstrata.transfer import peers as p

_LENGTH = struct.Struct("<I")
_TIMEVAL = struct.Struct("@ll")
_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
AHEAD_BYTES = 256
"""What is taken at once where a frame is to come: most frames are shorter than that."""
RECEIVE_BYTES = 1 << 16
LEAST, FIRST, MOST = 0.5, 0.8, 0.85
"""For how much of the time that is left the kernel is to wait before it is asked again: its timers
are late by up to an eighth. A call that ends late has a whole tier taken as hung for one peer."""
WITHIN_BYTES = 1 << 17
"""What the kernel keeps of what is sent within one machine, where nothing is ever under way: so
little stays in a core's cache until it is received, as what it would keep by itself does not."""
PIECE_BYTES = 1 << 20
"""Of an object, what is received before a checksum is made of it: it lies in a core's cache until
then. Smaller pieces were no faster for a node, whose loop waits for the interpreter meanwhile."""
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
        self._tls = isinstance(connected, ssl.SSLSocket)
        self._ahead = b""
        self._verdict = bytearray(p.LINE_BYTES)
        self._limits = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}
        #: what the other end said of itself, once it has proved that it knows a secret
        self.hello: p.Hello | None = None
        self.agent: bytes | None = None
        """Metadata of the other end's NIXL agent, once it has been asked for: for loans alone."""
        self.begin(timeout_s)
        if not self._tls:
            connected.setblocking(True)  # the kernel has the deadlines
        with contextlib.suppress(OSError):  # not of TCP
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
            if connected.getsockname()[0] == connected.getpeername()[0]:
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WITHIN_BYTES)

    def begin(self, timeout_s: float) -> None:
        """All that is sent and received until the next call of this may take so long together."""
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._note_limit()

    def send(self, message: p.Request | p.Reply) -> None:
        """Send a message.

        Raises:
            OSError: the other end has gone, or takes nothing.
        """
        self._send([_frame(p.encode(message))])

    def send_object(self, data: p.Data, payload: memoryview) -> None:
        """Send an object's bytes, and before them the message that announces them.

        `send_verdict` has to follow, which they may wait for.

        Raises:
            OSError: as of `send`.
        """
        # They wait for it, so that the other end is woken less often.
        self._send([_frame(p.aligned(data)), payload], 0 if self._tls else socket.MSG_MORE)

    def send_verdict(self, sent: p.Sent) -> None:
        """Send what has to follow an object's bytes.

        Raises:
            OSError: as of `send`.
        """
        self._send([_frame(p.aligned(sent))])

    def receive(self, rest_s: float | None = None) -> bytes:
        """One frame's body; empty where the other end has hung up between two.

        Args:
            rest_s: if given, the time begins anew with the first byte.
        Raises:
            OSError: the other end has gone, or says nothing.
            Incompatible: a frame that is longer than any.
        """
        while not self._ahead:
            self._wait(socket.SO_RCVTIMEO)
            try:
                self._ahead = self._socket.recv(AHEAD_BYTES)
            except BlockingIOError:
                continue  # too late, or soon
            if not self._ahead:
                return b""
        if rest_s is not None:
            self.begin(rest_s)
        return self._next(length_of(self._next(_LENGTH.size)))

    def receive_object(self, into: memoryview) -> bytes:
        """An object's bytes, into their place; and the verdict, which is what `receive` is for.

        Returns:
            Its payload's checksum.
        Raises:
            OSError: they did not come, or not in time.
        """
        starts = range(0, len(into), PIECE_BYTES)
        *pieces, last = [into[start : start + PIECE_BYTES] for start in starts]
        made, skip = xxhash.xxh3_128(), HEADER_BYTES
        # Other threads wait for the interpreter, so little is done with each of them.
        receive, now, add = self._socket.recv_into, time.monotonic, made.update
        for piece in pieces:
            came = 0
            if not self._ahead and now() < self._waits_until:
                try:
                    came = receive(piece, 0, socket.MSG_WAITALL)
                except BlockingIOError:  # too late, or soon
                    came = 0
            if came < PIECE_BYTES:
                self._fill(piece[came:])
            add(piece[skip:])
            skip = 0
        count = self._fill(last, self._verdict)
        self._ahead += self._verdict[:count]
        if len(into) >= HEADER_BYTES:
            add(into[starts[-1] + skip : payload_end(into)])
        return made.digest()

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

    def _send(self, parts: Sequence[bytes | memoryview], flags: int = 0) -> None:
        while parts:
            self._wait(socket.SO_SNDTIMEO)
            if self._tls:  # whose own deadline is for all of one
                self._socket.sendall(parts[0])
                parts = parts[1:]
                continue
            try:
                sent = self._socket.sendmsg(parts, (), flags)
            except BlockingIOError:
                continue  # too late, or soon
            while parts and sent >= len(parts[0]):
                sent, parts = sent - len(parts[0]), parts[1:]
            if sent:
                parts = [memoryview(parts[0])[sent:], *parts[1:]]

    def _next(self, count: int) -> bytes:
        if count > len(self._ahead):
            body = bytearray(count)
            self._fill(memoryview(body))
            return bytes(body)
        taken, self._ahead = self._ahead[:count], self._ahead[count:]
        return taken

    def _fill(self, into: memoryview, *behind: bytearray) -> int:
        """Receive exactly so many bytes, and what came of those behind them; how many these are."""
        place = min(len(self._ahead), len(into))
        into[:place], self._ahead = self._ahead[:place], self._ahead[place:]
        while place < len(into):
            self._wait(socket.SO_RCVTIMEO)
            rest = into[place:]
            try:
                if self._tls:
                    count = self._socket.recv_into(rest)
                else:
                    count = self._socket.recvmsg_into([rest, *behind], 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                continue  # too late, or soon
            if not count:
                raise ConnectionError("the other end hung up in the middle")
            place += count
        return place - len(into)

    def _wait(self, limit: int) -> None:
        """Have the next call end before the deadline, or soon after it.

        Raises:
            TimeoutError: that is over.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"nothing within {self._timeout_s:g} s")
        if self._tls:
            self._socket.settimeout(left)
        elif not LEAST * left <= self._limits[limit] <= MOST * left:
            # Not for each call: what is left now is about what was left the last time.
            self._limits[limit] = within = FIRST * left
            self._note_limit()
            # None at all would be for ever.
            seconds, microseconds = int(within), int(within % 1 * 1e6) or 1
            self._socket.setsockopt(socket.SOL_SOCKET, limit, _TIMEVAL.pack(seconds, microseconds))

    def _note_limit(self) -> None:
        """Until when what is received may begin without a word to the kernel (`_wait`)."""
        limit = self._limits[socket.SO_RCVTIMEO]
        self._waits_until = self._deadline - limit / MOST if limit and not self._tls else 0.0


class LoopChannel:
    """A connection that is heard on a loop: frames alone, and no call that waits.

    One thread may hear while another one speaks.

    Args:
        connected: does not block from now on.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._came = bytearray()
        self._torn = False  # a frame went out in part
        # What two threads do to one TLS connection at a time ends the process.
        tls = isinstance(connected, ssl.SSLSocket)
        self._alone: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if tls else contextlib.nullcontext()
        )
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
                with self._alone:
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
        frames = b"".join(_frame(p.encode(message)) for message in messages)
        if not self._torn:
            with self._alone:
                self._torn = self._socket.send(frames) < len(frames)
        if self._torn:
            raise ConnectionError("the other end takes nothing")

    def close(self) -> None:
        """Hang up. Repeatable."""
        with self._alone, contextlib.suppress(OSError):
            self._socket.close()


def _frame(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


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
        hello = hear(channel, str(address))
        if not isinstance(hello, p.Hello):
            raise Incompatible(f"{address} does not say hello")
        channel.send(handshake.check_server(hello, str(address)))
        if not isinstance(hear(channel, str(address)), p.Welcome):
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


def fetch(channel: Channel, name: bytes, into: memoryview, where: str) -> int:
    """Have an object brought to its place; its size (`Brought`), 0: not there, -1: it is larger.

    Raises:
        OSError, PeerRefused, Incompatible: as of `ask`.
    """
    data = ask(channel, p.Read(name, len(into)), where)
    if not isinstance(data, p.Data) or data.nbytes > len(into):
        raise Incompatible("it sends what nobody asked for")
    if data.nbytes <= 0:
        return data.nbytes
    checksum = channel.receive_object(into[: data.nbytes])
    sent = hear(channel, where)
    if not isinstance(sent, p.Sent):
        raise Incompatible("it does not say whether its bytes are whole")
    return Brought(data.nbytes, checksum) if sent.stayed else 0


def ask(channel: Channel, request: p.Request, where: str) -> p.Reply:
    """Send a request and wait for its answer.

    Raises:
        OSError: there is none.
        PeerRefused, Incompatible: another one.
    """
    channel.send(request)
    return hear(channel, where)


def hear(channel: Channel, where: str) -> p.Reply:
    """Wait for the next message.

    Raises:
        OSError, PeerRefused, Incompatible: as of `ask`.
    """
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
