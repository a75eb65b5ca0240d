"""Messages between a node and its clients: ``docs/protocol.md`` as code.

Frames are a little-endian 32-bit length and a MessagePack array. Encoding and decoding is
msgspec's; nothing here does I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

import kvstrata
from kvstrata.errors import Incompatible
from kvstrata.objects import NOBODY

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 64 << 20

#: offsets that `Reserved` answers instead of a slot
PRESENT, BUSY, FULL, REFUSED = -1, -2, -3, -4
#: the offset in `Matched` of an object that is still on its way into host memory
ARRIVING = -1
#: the tier byte in `Found` of a chunk that no tier has
ABSENT = 255


class _Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    pass


class Hello(_Message, tag="hello", frozen=True):
    version: int
    release: str
    pid: int
    node: bytes
    capacity_bytes: int
    secret: bytes
    tiers: list[str] = msgspec.field(default_factory=list)


class Match(_Message, tag="match", frozen=True):
    id: int
    keys: bytes
    parts: list[int]
    orders: list[str]
    lengths: list[int] = msgspec.field(default_factory=list)
    owner: bytes = NOBODY


class Matched(_Message, tag="matched", frozen=True):
    id: int
    lease: int
    tiers: bytes
    offsets: bytes


class Await(_Message, tag="await", frozen=True):
    id: int
    lease: int
    have: int


class Arrived(_Message, tag="arrived", frozen=True):
    id: int
    ready: int
    failed: bool
    offsets: bytes


class Release(_Message, tag="release", frozen=True):
    lease: int
    keep: int = 0


class Template(_Message, frozen=True):
    """What the headers of one reservation share; fields as in `kvstrata.objects.ObjectHeader`."""

    kind: str
    order: str
    dtype: str
    shape: list[int]
    num_tokens: int
    raw_length: int


class Reserve(_Message, tag="reserve", frozen=True):
    id: int
    namespace: bytes
    prefix: bytes
    first: int
    part: int
    template: Template
    cost: float = 0.0
    weights: str = ""
    owner: bytes = NOBODY


class Reserved(_Message, tag="reserved", frozen=True):
    id: int
    reservation: int
    offsets: bytes


class Commit(_Message, tag="commit", frozen=True):
    id: int
    reservation: int
    checksums: bytes


class Done(_Message, tag="done", frozen=True):
    id: int
    count: int


class Lookup(_Message, tag="lookup", frozen=True):
    id: int
    keys: bytes
    parts: list[int]


class Found(_Message, tag="found", frozen=True):
    id: int
    tiers: bytes


class Clear(_Message, tag="clear", frozen=True):
    id: int
    keys: bytes | None = None
    tiers: list[str] = msgspec.field(default_factory=list)


class Flush(_Message, tag="flush", frozen=True):
    id: int


class Status(_Message, tag="status", frozen=True):
    id: int


class State(_Message, tag="state", frozen=True):
    id: int
    state: dict[str, Any]


class Record(_Message, tag="record", frozen=True):
    record: dict[str, Any]


class Bye(_Message, tag="bye", frozen=True):
    pass


class Failed(_Message, tag="failed", frozen=True):
    id: int
    kind: str
    message: str


Request = (
    Match | Await | Release | Reserve | Commit | Lookup | Clear | Flush | Status | Record | Bye
)
Reply = Hello | Matched | Arrived | Reserved | Done | Found | State | Failed

# What msgspec raises beside its own error: text that is not UTF-8, depth, a map as a map's key.
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError)

_length = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """One frame."""
    body = _encoder.encode(message)
    return _length.pack(len(body)) + body


def decode_request(body: bytes) -> Request:
    """Raises `Incompatible` for anything that is not a request of this version."""
    try:
        return _request_decoder.decode(body)
    except _UNDECODABLE as error:
        raise Incompatible(f"not a request of protocol {PROTOCOL_VERSION}: {error}") from error


def decode_reply(body: bytes) -> Reply:
    """Raises `Incompatible` for anything that is not a reply of this version."""
    try:
        return _reply_decoder.decode(body)
    except _UNDECODABLE as error:
        raise Incompatible(f"not a reply of protocol {PROTOCOL_VERSION}: {error}") from error


def decode_hello(body: bytes) -> Hello:
    """Raises `Incompatible` for another version's hello, whatever that looks like."""
    try:
        words = msgspec.msgpack.decode(body, type=list)
    except _UNDECODABLE:
        words = []
    if words[:1] != ["hello"] or len(words) < 3:
        raise Incompatible("the other end of the socket is no node")
    _, version, release, *_ = words
    if version != PROTOCOL_VERSION:
        raise Incompatible(
            f"the node (KVStrata {release}) speaks protocol {version}, this client (KVStrata "
            f"{kvstrata.__version__}) {PROTOCOL_VERSION}; install one release on both sides"
        )
    hello = decode_reply(body)
    assert isinstance(hello, Hello)
    return hello


class Frames:
    """Cuts a byte stream into frames.

    Feed it what came; it yields each frame's body once the whole of it is there.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Raises `Incompatible` when a frame announces more than `MAX_FRAME_BYTES`."""
        self._buffer += data
        start, end = 0, len(self._buffer)
        try:
            while end - start >= 4:
                (length,) = _length.unpack_from(self._buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise Incompatible(f"a frame of {length} bytes; {MAX_FRAME_BYTES} at most")
                if end - start - 4 < length:
                    break
                body = bytes(self._buffer[start + 4 : start + 4 + length])
                start += 4 + length
                yield body
        finally:
            del self._buffer[:start]


def count(packed: bytes, size: int) -> int:
    """How many items a packed column has. Raises `Incompatible` when it does not divide."""
    if len(packed) % size:
        raise Incompatible(f"a column of {len(packed)} bytes is no multiple of {size}")
    return len(packed) // size


def split(packed: bytes, size: int) -> list[bytes]:
    """Cut a packed column into its items. Raises `Incompatible` when it does not divide."""
    return [packed[i * size : (i + 1) * size] for i in range(count(packed, size))]
