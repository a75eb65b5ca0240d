"""What an object's value begins with in Redis: one line that says its version and its size.

``docs/redis.md`` has the line. An object that is longer than a piece is cut: the first piece
follows the line, the others are values of their own under names that no other object ever has.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = b"kvstrata-object "
_LINE = re.compile(MAGIC + rb"1 ([0-9a-f]{16}) ([0-9a-f]{16}) ([0-9a-f]{16})\n")


class Head(NamedTuple):
    """The line.

    Args:
        version: 16 hex digits, like no other object's.
        nbytes: the object's whole size.
        piece_bytes: what each piece of it holds, but for the last.
    """

    version: str
    nbytes: int
    piece_bytes: int

    def encode(self) -> bytes:
        """The line, `HEAD_BYTES` long."""
        line = MAGIC + b"1 %s %016x %016x\n"
        return line % (self.version.encode(), self.nbytes, self.piece_bytes)

    @property
    def bounds(self) -> Iterator[tuple[int, int]]:
        """Where each piece begins and ends in the object."""
        for start in range(0, self.nbytes, self.piece_bytes):
            yield start, min(start + self.piece_bytes, self.nbytes)

    def later(self, key: bytes) -> list[bytes]:
        """The keys of the pieces behind the first one."""
        count = len(range(self.piece_bytes, self.nbytes, self.piece_bytes))
        return [b"%s:%s:%d" % (key, self.version.encode(), 1 + i) for i in range(count)]


HEAD_BYTES = len(Head("0" * 16, 0, 0).encode())
MAX_PIECES = 1 << 16
"""Of one object; a line that says more is none of ours."""


def new_head(nbytes: int, piece_bytes: int) -> Head:
    """Of an object that never was."""
    return Head(secrets.token_hex(8), nbytes, piece_bytes)


def beginning(version: str) -> bytes:
    """What the line of this version begins with."""
    return MAGIC + b"1 " + version.encode()


def decode_head(line: bytes) -> Head | None:
    """The inverse; None if it is no such line."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    head = Head(found[1].decode(), int(found[2], 16), int(found[3], 16))
    if not 0 < head.nbytes <= MAX_PIECES * head.piece_bytes:
        return None
    return head
