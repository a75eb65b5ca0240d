"""Connections of redis-py that keep to a deadline, and move large values without copies.

redis-py joins a large value to a command, and takes one out of a reply, in Python's memory: each
of these copies holds the interpreter's lock, for milliseconds. Here a value is sent from the
buffers that it lies in, and a reply is received into the buffers that it is for. All else, who to
ask and what to do about a redirection, is redis-py's.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import redis
from redis.connection import DefaultParser

SLICE = 1 << 20
"""Of a value that is sent: each has the time of one step."""
_BULK = re.compile(rb"\$(-1|[0-9]{1,18})")
_LONGEST_LINE = 4096

_calls = threading.local()


class Time:
    """How long the calls of this thread may still take; a context.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def __enter__(self) -> Time:
        _calls.until = self._until
        return self

    def __exit__(self, *error: object) -> None:
        _calls.until = None

    @property
    def left_s(self) -> float:
        """What is left of it."""
        return self._until - time.monotonic()


class Buffers(list[memoryview]):
    """What is one value, though it does not lie in one place."""

    @property
    def nbytes(self) -> int:
        return sum(len(one) for one in self)

    def __repr__(self) -> str:
        return f"<{self.nbytes} bytes>"


class PlainConnection(redis.Connection):
    """A connection of redis-py with a deadline, and `Buffers` in commands and for replies."""

    _sock: Any
    _into: Buffers | None = None

    def _patience(self) -> float:
        """Seconds that the next step may take: a connection, a slice sent, a piece received."""
        longest: float = self.socket_timeout
        until = getattr(_calls, "until", None)
        if until is None:
            return longest
        left: float = until - time.monotonic()
        if left <= 0:
            raise redis.TimeoutError("it did not answer in time")
        return min(longest, left)

    def _timed(self) -> Any:
        """The socket, with the time that its next step may take."""
        sock = self._sock
        if sock is None:  # another thread has found out that the server is gone
            raise redis.ConnectionError("the connection was closed")
        sock.settimeout(self._patience())
        return sock

    def _connect(self) -> Any:
        self.socket_connect_timeout = self._patience()
        return super()._connect()

    def can_read(self, *args: Any, **options: Any) -> bool:
        """See redis-py, which looks at nothing if another thread hangs up in the middle of it."""
        try:
            found: bool = super().can_read(*args, **options)
        except (AttributeError, TypeError) as error:
            raise redis.ConnectionError("the connection was closed") from error
        return found

    def send_command(self, *args: Any, into: Buffers | None = None, **options: Any) -> None:
        """See redis-py. The reply is put into the buffers, if there are any."""
        if any(isinstance(one, Buffers) for one in args):
            self.send_packed_command(self._packed(args), options.get("check_health", True))
        else:
            super().send_command(*args, **options)
        self._into = into  # now: to connect again takes commands of its own

    def pack_commands(self, commands: Any) -> Any:
        """See redis-py."""
        commands = list(commands)
        if any(isinstance(one, Buffers) for command in commands for one in command):
            return (part for command in commands for part in self._packed(command))
        return super().pack_commands(commands)

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """See redis-py."""
        if self._sock is not None:
            self._timed()
        super().send_packed_command(command, check_health)

    def _packed(self, args: Sequence[Any]) -> Iterator[bytes | memoryview]:
        text = b"*%d\r\n" % len(args)
        for one in args:
            if not isinstance(one, Buffers):
                data = one if isinstance(one, bytes) else str(one).encode()
                text += b"$%d\r\n%s\r\n" % (len(data), data)
                continue
            yield text + b"$%d\r\n" % one.nbytes
            for buffer in one:
                for start in range(0, len(buffer), SLICE):
                    self._timed()
                    yield buffer[start : start + SLICE]
            text = b"\r\n"
        yield text

    def read_response(self, *args: Any, **options: Any) -> Any:
        """See redis-py. With buffers: the value's length, whether it fits or not; or None."""
        into, self._into = self._into, None
        self._timed()
        if into is None:
            return super().read_response(*args, **options)
        try:
            return self._read_value(into)
        except redis.ResponseError:
            raise
        except TimeoutError as error:
            self.disconnect()
            raise redis.TimeoutError("it did not answer in time") from error
        except OSError as error:
            self.disconnect()
            raise redis.ConnectionError(f"the connection broke: {error}") from error
        except BaseException:
            self.disconnect()
            raise

    def _read_value(self, into: Buffers) -> int | None:
        line, rest = self._read_line()
        if line.startswith(b"-") and not rest:
            raise DefaultParser.parse_error(line[1:].decode(errors="replace"))
        found = _BULK.fullmatch(line)
        if found is None:
            raise redis.InvalidResponse(f"no value, but {line[:64]!r}")
        length = int(found[1])
        if length < 0:
            return None
        if length > into.nbytes:
            self.disconnect()  # or what it does not fit into would have to be read
            return length
        left = length
        for buffer in into:
            part = buffer[:left]
            left -= len(part)
            rest = self._fill(part, rest)
        rest = self._fill(memoryview(bytearray(2)), rest)
        if rest:
            raise redis.InvalidResponse("more than one value")
        return length

    def _read_line(self) -> tuple[bytes, bytes]:
        """The first line of a reply, and what came with it."""
        buffer, data = memoryview(bytearray(512)), b""
        while b"\r\n" not in data:
            if len(data) > _LONGEST_LINE:
                raise redis.InvalidResponse("a line without an end")
            data += buffer[: self._receive_into(buffer)]
        line, _, rest = data.partition(b"\r\n")
        return line, rest

    def _fill(self, part: memoryview, first: bytes) -> bytes:
        """Receive all of a buffer, of which the first bytes are here; returns what is over."""
        done = min(len(part), len(first))
        part[:done] = first[:done]
        while done < len(part):
            done += self._receive_into(part[done:])
        return first[len(part) :]

    def _receive_into(self, buffer: memoryview) -> int:
        count: int = self._timed().recv_into(buffer)
        if not count:
            raise redis.ConnectionError("it closed the connection")
        return count


class TlsConnection(PlainConnection, redis.SSLConnection):
    """The same over TLS."""
