"""Messages between a node and its clients: ``docs/protocol.md`` as code.

Frames are a little-endian 32-bit length and a MessagePack array. Encoding and decoding is
msgspec's; nothing here does I/O.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import Annotated

import msgspec

import kvstrata
from kvstrata.errors import Incompatible, UsageError
from kvstrata.header import CHECKSUM_BYTES, NOBODY
from kvstrata.secret import MAX_SECRETS
from kvstrata.wire import operating
from kvstrata.wire.message import Message, Numbers, Strings
from kvstrata.wire.operating import MAX_REASONS as MAX_REASONS
from kvstrata.wire.operating import Change as Change
from kvstrata.wire.operating import Clear as Clear
from kvstrata.wire.operating import Explain as Explain
from kvstrata.wire.operating import Explained as Explained
from kvstrata.wire.operating import Flush as Flush
from kvstrata.wire.operating import Found as Found
from kvstrata.wire.operating import Lookup as Lookup
from kvstrata.wire.operating import Measured as Measured
from kvstrata.wire.operating import Metrics as Metrics
from kvstrata.wire.operating import Pin as Pin
from kvstrata.wire.operating import Pinned as Pinned
from kvstrata.wire.operating import PinPage as PinPage
from kvstrata.wire.operating import Pins as Pins
from kvstrata.wire.operating import PinState as PinState
from kvstrata.wire.operating import Quota as Quota
from kvstrata.wire.operating import Reasons
from kvstrata.wire.operating import Record as Record
from kvstrata.wire.operating import RecordPage as RecordPage
from kvstrata.wire.operating import Records as Records
from kvstrata.wire.operating import State as State
from kvstrata.wire.operating import Status as Status
from kvstrata.wire.operating import Unpin as Unpin
from kvstrata.wire.operating import Watch as Watch
from kvstrata.wire.operating import Watched as Watched

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 4 << 20
MAX_SHORT_FRAME_BYTES = 64 << 10
"""Of the messages that have no column."""

MAX_KEYS = 1 << 15
"""In a match, a lookup, a clear, and in the prefix of a reservation."""
MAX_OBJECTS = 1 << 18
"""Of a match or a lookup: chunks times parts."""
MAX_INSIDE = 1 << 10
"""Parts that one question about what is inside may have: it is answered in one go."""
MAX_RESERVED = 1 << 12
"""Chunks that one reservation may ask for."""
MAX_PAGE = 256
"""Items in one page of a list."""

#: offsets that `Reserved` answers instead of a slot
PRESENT, BUSY, FULL, REFUSED, DRAINING = -1, -2, -3, -4, -5
#: the offset in `Matched` of an object that is still on its way into host memory
ARRIVING = -1
#: the offset in `Matched` of an object that is not needed at the boundary that was found
NEEDLESS = -6
#: the tier byte in `Found` of a chunk that no tier has
ABSENT = 255


class Hello(Message, tag="hello", frozen=True):
    version: int
    release: str
    pid: int
    node: bytes
    capacity_bytes: int
    secrets: Annotated[list[bytes], msgspec.Meta(min_length=1, max_length=MAX_SECRETS)]
    tiers: list[str] = msgspec.field(default_factory=list)
    address: str = ""

    @property
    def secret(self) -> bytes:
        """The one that stores use."""
        return self.secrets[0]


class Match(Message, tag="match", frozen=True):
    id: int
    keys: bytes
    parts: Numbers
    orders: Strings
    lengths: Numbers = msgspec.field(default_factory=list)
    owner: bytes = NOBODY
    namespace: bytes = b""
    chunk_s: float = 0.0
    pair_s: float = 0.0
    peer: str = ""
    expected_s: float = 0.0
    tail: Numbers = msgspec.field(default_factory=list)
    heads: bytes = b""
    traceparent: str = ""
    tiers: Strings = msgspec.field(default_factory=list)
    needs: Numbers = msgspec.field(default_factory=list)
    meet: bool = False


class Matched(Message, tag="matched", frozen=True):
    id: int
    lease: int
    tiers: bytes
    offsets: bytes
    found: int = 0
    load_s: float = 0.0
    rest_s: float = 0.0
    compute_s: float = 0.0
    peer_refused: str = ""
    why: Reasons = msgspec.field(default_factory=list)
    end: int = 0
    meet: int = 0


class Await(Message, tag="await", frozen=True):
    id: int
    lease: int
    have: int
    backwards: bool = False


class Arrived(Message, tag="arrived", frozen=True):
    id: int
    ready: int
    failed: bool
    offsets: bytes


class Release(Message, tag="release", frozen=True):
    lease: int
    keep: int = 0


class Inside(Message, tag="inside", frozen=True):
    id: int
    lease: int
    marks: bytes
    parts: Numbers
    orders: Strings
    lengths: Numbers
    block_tokens: Numbers
    owner: bytes = NOBODY
    token_s: float = 0.0
    tiers: Strings = msgspec.field(default_factory=list)
    needs: Numbers = msgspec.field(default_factory=list)


class Nearest(Message, tag="nearest", frozen=True):
    id: int
    lease: int
    have: int
    key: bytes = b""
    num_tokens: int = 0
    good_tokens: int = 0
    tier: int = 0
    offsets: bytes = b""


class Template(Message, frozen=True):
    """What the headers of one reservation share; fields as in `kvstrata.header.ObjectHeader`.

    ``producer`` is the engine that computes them, printable ASCII without spaces, 32 characters at
    most; empty: nobody says. ``positions`` is of the one object of kept tokens.
    """

    kind: str
    order: str
    dtype: str
    shape: Numbers
    num_tokens: int
    raw_length: int
    chunk_tokens: int = 0
    group: int = 0
    group_kind: str = "full"
    boundary: int = 0
    producer: str = ""
    positions: bytes = bytes(CHECKSUM_BYTES)


class Reserve(Message, tag="reserve", frozen=True):
    id: int
    namespace: bytes
    prefix: bytes
    first: int
    part: int
    template: Template
    cost: float = 0.0
    weights: str = ""
    owner: bytes = NOBODY
    lend: bool = False
    traceparent: str = ""
    priority: int = 0
    tiers: Strings = msgspec.field(default_factory=list)
    marks: bytes = b""


class Reserved(Message, tag="reserved", frozen=True):
    id: int
    reservation: int
    offsets: bytes


class Commit(Message, tag="commit", frozen=True):
    id: int
    reservation: int
    checksums: bytes


class Done(Message, tag="done", frozen=True):
    id: int
    count: int


class Bye(Message, tag="bye", frozen=True):
    pass


class Failed(Message, tag="failed", frozen=True):
    id: int
    kind: str
    message: str


Request = Match | Inside | Await | Release | Reserve | Commit | operating.Request | Bye
Reply = Hello | Matched | Nearest | Arrived | Reserved | Done | operating.Reply | Failed

# What msgspec raises beside its own error: text that is not UTF-8, depth, a map as a map's key.
BLOCK = 64
"""Items of a packed column that are cut out in one call."""
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError)

_length = struct.Struct("<I")
LENGTH_BYTES = _length.size
_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


# Messages with columns, by how their bytes begin behind the array's length: with the tag.
_LONG = tuple(
    bytes([0xA0 + len(tag)]) + tag
    for tag in (b"match", b"lookup", b"clear", b"pin", b"reserve", b"commit",
                b"prefetch", b"copy", b"move", b"send", b"transcode",
                b"matched", b"arrived", b"reserved", b"found", b"state", b"measured",
                b"record_page", b"watched", b"listed", b"job_page", b"pin_page",
                b"explain", b"explained")
)  # fmt: skip


def max_bytes(body: bytes) -> int:
    """How long a message that begins like this may be."""
    # An array of 16 and more says its length in two bytes of their own.
    short_array, long_array = body[:1] <= b"\x9f", body[:1] == b"\xdc"
    long = (short_array or long_array) and body.startswith(_LONG, 3 if long_array else 1)
    return MAX_FRAME_BYTES if long else MAX_SHORT_FRAME_BYTES


def encode(message: Request | Reply) -> bytes:
    """One frame. Raises `UsageError` for what no frame may hold."""
    try:
        body = _encoder.encode(message)
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        what = type(message).__name__.lower()
        raise UsageError(f"a {what} that cannot be encoded: {error}") from error
    if len(body) > max_bytes(body):
        what = type(message).__name__.lower()
        raise UsageError(f"a {what} of {len(body)} bytes; {max_bytes(body)} at most")
    return _length.pack(len(body)) + body


def check_limits(request: Request) -> None:
    """Raises `UsageError` for a request that asks for too much at once."""
    keys, num_parts = b"", 0
    match request:
        case Match() | Lookup():
            keys, num_parts = request.keys, len(request.parts)
        case Explain():
            keys = request.keys
        case Clear() | Pin() | operating.Transcode():
            keys = request.keys or b""
        case operating.Prefetch() | operating.Copy() | operating.Send():
            keys, num_parts = request.keys, len(request.parts)
        case Reserve():
            keys = request.prefix
    what, num_keys = type(request).__name__.lower(), len(keys) // 32
    if num_keys > MAX_KEYS:
        raise UsageError(f"a {what} of {num_keys} keys; {MAX_KEYS} at most: send several")
    if num_keys * num_parts > MAX_OBJECTS:
        raise UsageError(f"a {what} of {num_keys} chunks of {num_parts} parts; {MAX_OBJECTS} "
                         "objects at most: ask for fewer chunks")  # fmt: skip
    if isinstance(request, Inside) and len(request.parts) > MAX_INSIDE:
        raise UsageError(f"{len(request.parts)} parts inside a chunk; {MAX_INSIDE} at most")
    if isinstance(request, Reserve) and num_keys - request.first > MAX_RESERVED:
        raise UsageError(f"{num_keys - request.first} chunks to reserve; {MAX_RESERVED} at most: "
                         "commit some first")  # fmt: skip


def decode_request(body: bytes) -> Request:
    """Raises `Incompatible` for anything that is not a request of this version."""
    if len(body) > max_bytes(body):
        raise Incompatible(f"a short message of {len(body)} bytes; {max_bytes(body)} at most")
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
                with memoryview(self._buffer) as view:
                    body = bytes(view[start + 4 : start + 4 + length])
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
    block = _block_of(size)
    end = count(packed, size) // BLOCK * block.size
    items: list[bytes] = []
    for place in range(0, end, block.size):
        items += block.unpack_from(packed, place)
    items += [packed[place : place + size] for place in range(end, len(packed), size)]
    return items


@functools.cache
def _block_of(size: int) -> struct.Struct:
    return struct.Struct(f"{size}s" * BLOCK)
