"""The stored format of an object: one header page that says all, then the payload.

``docs/format.md`` is the contract. A page decodes to exactly the header that encodes to it, so
there are no bytes on it that are not checked.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import xxhash

from kvstrata.errors import CorruptObject, Incompatible, UsageError

Buffer: TypeAlias = bytes | bytearray | memoryview

FORMAT_VERSION = 2
HEADER_BYTES = 4096
OBJECT_ID_BYTES = 36
CHECKSUM_BYTES = 16
NO_PARENT = bytes(32)
NOBODY = bytes(16)
NOT_ENCRYPTED = bytes(16)
MAX_CHUNK_TOKENS = 4096
MARK_TOKENS, MARK_BYTES = 16, 12
SEALED_BYTES = 28
"""By which encryption makes a payload longer: nonce and tag."""
MAX_DIMS = 8
GROUP_BITS = 12
"""Of a header's group: the layer group; the four bits above say which coarser copy it is."""

_MAGIC = b"KVSTRATA"
Kind: TypeAlias = Literal["native", "portable", "kept"]
GroupKind: TypeAlias = Literal["full", "sliding", "chunked", "recurrent"]

_KINDS: dict[Kind, int] = {"native": 1, "portable": 2, "kept": 3}
_KIND_NAMES: dict[int, Kind] = {code: name for name, code in _KINDS.items()}
_GROUP_KINDS: dict[GroupKind, int] = {"full": 1, "sliding": 2, "chunked": 3, "recurrent": 4}
_GROUP_KIND_NAMES: dict[int, GroupKind] = {code: name for name, code in _GROUP_KINDS.items()}

_ID = struct.Struct("<32sHH")
_PREFIX = struct.Struct("<8sH")
_PAGE = struct.Struct("<8sHBBHH 16s 32s32s32s QII QQ16s16s QQ 8Q 64s32s32s 256s")
_SINCE_2 = struct.Struct("<16s IB3x Q16s16s I300x 3072s")
_CHECKSUM = slice(16, 32)
_KIN, _PARENT = struct.Struct("<32sQI"), 96
_OF_MARKS, _MARKS = (struct.Struct("<I532xI44xI"), 136), 1024
NAMESPACE_FIELD = slice(32, 64)
"""Of a header page: what the object belongs to."""
CREATED_FIELD = slice(200, 208)
"""When it was created, nanoseconds since 1970, little endian."""
OWNER_FIELD = slice(_PAGE.size, _PAGE.size + 16)
"""Whose it is; zeros on a page of version 1."""
_GROUP_KIND_BYTE = _PAGE.size + 20


class Kinship(NamedTuple):
    """Where a chunk stands in its prompt; fields as in `ObjectHeader`."""

    parent: bytes
    start: int
    num_tokens: int


class ObjectHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one object; ``docs/format.md`` gives each field's meaning.

    Lengths in bytes: ``namespace``, ``key`` and ``parent`` 32, checksums 16, ``order`` at most
    64, ``dtype`` and ``codec`` at most 32, ``codec_parameters`` at most 256; ``owner``,
    ``encryption_key`` and ``positions`` 16; ``marks`` 12 for every 16 tokens, or none. Building a
    header checks nothing; `encode` and `decode` do.
    """

    namespace: bytes
    key: bytes
    parent: bytes
    start: int
    num_tokens: int
    group: int
    rank: int
    kind: Kind
    order: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    codec_parameters: bytes
    epoch: int
    created_ns: int
    raw_length: int
    stored_length: int
    raw_checksum: bytes
    stored_checksum: bytes
    chunk_tokens: int
    owner: bytes = NOBODY
    group_kind: GroupKind = "full"
    boundary: int = 0
    encryption_key: bytes = NOT_ENCRYPTED
    positions: bytes = bytes(CHECKSUM_BYTES)
    marks: bytes = b""

    @property
    def object_id(self) -> bytes:
        """36 bytes: key, group, rank."""
        return object_id(self.key, self.group, self.rank)

    @property
    def is_tail(self) -> bool:
        """Whether it is shorter than a chunk: the end of a prompt, or of an answer."""
        return self.num_tokens < self.chunk_tokens

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + self.num_tokens

    def problem(self) -> str:
        """The first rule of the format that these values break, in words; empty if none."""
        for name, value, nbytes in (
            ("namespace", self.namespace, 32),
            ("key", self.key, 32),
            ("parent", self.parent, 32),
            ("raw_checksum", self.raw_checksum, CHECKSUM_BYTES),
            ("stored_checksum", self.stored_checksum, CHECKSUM_BYTES),
            ("owner", self.owner, 16),
            ("encryption_key", self.encryption_key, 16),
            ("positions", self.positions, CHECKSUM_BYTES),
        ):
            if len(value) != nbytes:
                return f"{name} has {len(value)} bytes, not {nbytes}"
        for name, number, low, bits in (
            ("start", self.start, 0, 64),
            ("num_tokens", self.num_tokens, 1, 32),
            ("group", self.group, 0, 16),
            ("rank", self.rank, 0, 16),
            ("epoch", self.epoch, 0, 64),
            ("created_ns", self.created_ns, 0, 64),
            ("raw_length", self.raw_length, 1, 64),
            ("stored_length", self.stored_length, 1, 64),
            ("boundary", self.boundary, 0, 64),
        ):
            if not low <= number < 1 << bits:
                return f"{name} is {number}, not {low} to 2^{bits} - 1"
        for name, text, least, most in (
            ("order", self.order, 0, 64),
            ("dtype", self.dtype, 1, 32),
            ("codec", self.codec, 1, 32),
        ):
            if not least <= len(text) <= most:
                return f"{name} has {len(text)} characters, not {least} to {most}"
            if not (text.isascii() and text.isprintable()) or " " in text:
                return f"{name} {text!r} is not printable ASCII without spaces"
        if not 1 <= len(self.shape) <= MAX_DIMS:
            return f"shape has {len(self.shape)} dimensions, not 1 to {MAX_DIMS}"
        if not all(1 <= size < 1 << 64 for size in self.shape):
            return f"shape {self.shape} has a dimension that is not 1 to 2^64 - 1"
        if len(self.codec_parameters) > 256:
            return f"codec_parameters has {len(self.codec_parameters)} bytes, more than 256"
        if self.kind not in _KINDS:
            return f"kind {self.kind!r} is none of {', '.join(_KINDS)}"
        if (self.kind == "native") != bool(self.order):
            return f"a {self.kind} payload with the order {self.order!r}"
        if self.start == 0 and self.parent != NO_PARENT:
            return f"start 0 does not go with parent {self.parent.hex()}"
        return self._problem_of_chunk() or self._problem_of_lengths()

    def _problem_of_chunk(self) -> str:
        if not self.num_tokens <= self.chunk_tokens <= MAX_CHUNK_TOKENS:
            return (
                f"{self.num_tokens} tokens of a chunk of {self.chunk_tokens}; a chunk has at most "
                f"{MAX_CHUNK_TOKENS}"
            )
        if len(self.marks) not in (0, self.num_tokens // MARK_TOKENS * MARK_BYTES):
            return f"marks of {len(self.marks)} bytes do not go with {self.num_tokens} tokens"
        if self.group_kind not in _GROUP_KINDS:
            return f"group_kind {self.group_kind!r} is none of {', '.join(_GROUP_KINDS)}"
        looks_back = {"full": self.boundary == 0, "recurrent": self.boundary == self.end}
        if not looks_back.get(self.group_kind, self.boundary > 0):
            return f"a {self.group_kind} group with the boundary {self.boundary}"
        if self.kind != "kept" and self.positions != bytes(CHECKSUM_BYTES):
            return f"a {self.kind} payload with positions"
        if self.kind == "kept" and len(self.shape) != 5:
            return f"a kept payload of shape {self.shape}, not [L, S, H, R, D]"
        if self.kind == "kept" and self.group_kind != "recurrent":
            return f"a kept payload of a {self.group_kind} group: it stands for all before its end"
        return ""

    def _problem_of_lengths(self) -> str:
        sealed = self.encryption_key != NOT_ENCRYPTED
        if self.codec == "raw" and self.stored_length != self.raw_length + SEALED_BYTES * sealed:
            return f"raw, but {self.raw_length} bytes became {self.stored_length}"
        if self.codec == "raw" and not sealed and self.raw_checksum != self.stored_checksum:
            return "raw, but the two payload checksums differ"
        if sealed and self.stored_length <= SEALED_BYTES:
            return f"encrypted, in {self.stored_length} bytes"
        return ""

    def encode(self) -> bytes:
        """The header page, 4096 bytes.

        Raises:
            UsageError: a value the format does not allow; the message says which.
        """
        if problem := self.problem():
            raise UsageError(f"object header: {problem}")
        return self._page(FORMAT_VERSION, self._since_2())

    def _since_2(self) -> bytes:
        return _SINCE_2.pack(
            self.owner,
            self.chunk_tokens,
            _GROUP_KINDS[self.group_kind],
            self.boundary,
            self.encryption_key,
            self.positions,
            len(self.marks) // MARK_BYTES,
            self.marks,
        )

    def _page(self, version: int, since_2: bytes) -> bytes:
        num_dims = len(self.shape)
        body = _PAGE.pack(
            _MAGIC,
            version,
            _KINDS[self.kind],
            num_dims,
            self.group,
            self.rank,
            b"",
            self.namespace,
            self.key,
            self.parent,
            self.start,
            self.num_tokens,
            len(self.codec_parameters),
            self.raw_length,
            self.stored_length,
            self.raw_checksum,
            self.stored_checksum,
            self.epoch,
            self.created_ns,
            *self.shape,
            *(0,) * (MAX_DIMS - num_dims),
            self.order.encode(),
            self.dtype.encode(),
            self.codec.encode(),
            self.codec_parameters,
        )
        digest = checksum(body + since_2)
        return body[: _CHECKSUM.start] + digest + body[_CHECKSUM.stop :] + since_2


def decode(buffer: Buffer) -> ObjectHeader:
    """The header on the first 4096 bytes of ``buffer``, checked; its payload is not looked at.

    Raises:
        Incompatible: an unknown format version, or a kind of payload or group that this build does
            not know.
        CorruptObject: anything else that is not exactly what `ObjectHeader.encode` writes.
    """
    page = bytes(memoryview(buffer)[:HEADER_BYTES])
    if len(page) < HEADER_BYTES:
        raise CorruptObject(f"header page of {len(page)} bytes, not {HEADER_BYTES}")
    magic, version = _PREFIX.unpack_from(page)
    if magic != _MAGIC:
        raise CorruptObject(f"header begins with {magic!r}, not {_MAGIC!r}")
    if version not in (1, FORMAT_VERSION):
        raise Incompatible(f"object format version {version}; this build reads 1 and 2")
    fields = _PAGE.unpack_from(page)
    zeroed = page[: _CHECKSUM.start] + bytes(CHECKSUM_BYTES) + page[_CHECKSUM.stop :]
    if checksum(zeroed) != fields[6]:
        raise CorruptObject("header checksum does not match")
    kind, num_dims, parameters_length = fields[2], fields[3], fields[12]
    if kind not in _KIND_NAMES:
        known = ", ".join(f"{code} {name}" for name, code in _KINDS.items())
        raise Incompatible(f"payload kind {kind}; this build knows {known}")
    try:
        order, dtype, codec = (text.rstrip(b"\0").decode("ascii") for text in fields[27:30])
    except UnicodeDecodeError as error:
        raise CorruptObject("header holds a text that is not ASCII") from error
    since_2 = _fields_since_2(page) if version > 1 else {"chunk_tokens": fields[11]}
    header = ObjectHeader(
        namespace=fields[7],
        key=fields[8],
        parent=fields[9],
        start=fields[10],
        num_tokens=fields[11],
        group=fields[4],
        rank=fields[5],
        kind=_KIND_NAMES[kind],
        order=order,
        dtype=dtype,
        shape=fields[19 : 19 + num_dims],
        codec=codec,
        codec_parameters=fields[30][:parameters_length],
        epoch=fields[17],
        created_ns=fields[18],
        raw_length=fields[13],
        stored_length=fields[14],
        raw_checksum=fields[15],
        stored_checksum=fields[16],
        **since_2,
    )
    if problem := header.problem():
        raise CorruptObject(f"header: {problem}")
    again = header._page(version, header._since_2() if version > 1 else bytes(_SINCE_2.size))
    if again != page:
        raise CorruptObject("header holds more than its fields: padding or a count is wrong")
    if version == 1 and (
        header.kind == "kept" or bool(header.start) == (header.parent == NO_PARENT)
    ):
        raise CorruptObject("header of version 1 with what version 2 brought")
    return header


def kinship(page: Buffer) -> Kinship:
    """Out of a header page that has been checked before; nothing is checked here."""
    return Kinship(*_KIN.unpack_from(page, _PARENT))


def saved_s(page: Buffer, chunk_s: float, *, alone: bool) -> float:
    """What an object saves, in seconds; 0: nothing that its chunk does not say. Nothing is checked.

    A state saves all that is before it. Of a chunk that has tokens of its own what computing these
    takes is what counts: without the chunks before it the state is of no use.

    Args:
        page: its header page, checked before.
        chunk_s: what computing a chunk takes.
        alone: whether nothing else of the chunk is there.
    """
    if page[_GROUP_KIND_BYTE] != _GROUP_KINDS["recurrent"]:
        return chunk_s
    _, chunk_tokens, _, boundary, *_ = _SINCE_2.unpack_from(page, _PAGE.size)
    return float(chunk_s * boundary / chunk_tokens) if alone else 0.0


def marks_of(page: Buffer) -> tuple[int, int, bytes]:
    """Tokens, tokens of a whole chunk, and marks, out of a page that has been checked before."""
    fields, at = _OF_MARKS
    num_tokens, chunk_tokens, num_marks = fields.unpack_from(page, at)
    return num_tokens, chunk_tokens, bytes(page[_MARKS : _MARKS + num_marks * MARK_BYTES])


def _fields_since_2(page: bytes) -> dict[str, Any]:
    owner, chunk_tokens, group_kind, boundary, key, positions, num_marks, marks = (
        _SINCE_2.unpack_from(page, _PAGE.size)
    )
    if group_kind not in _GROUP_KIND_NAMES:
        known = ", ".join(f"{code} {name}" for name, code in _GROUP_KINDS.items())
        raise Incompatible(f"group kind {group_kind}; this build knows {known}")
    return {
        "owner": owner,
        "chunk_tokens": chunk_tokens,
        "group_kind": _GROUP_KIND_NAMES[group_kind],
        "boundary": boundary,
        "encryption_key": key,
        "positions": positions,
        "marks": marks[: num_marks * MARK_BYTES],
    }


def verify_object(buffer: Buffer, object_id: bytes) -> ObjectHeader:
    """Check a whole object: header, identity, length, padding, payload checksum.

    Costs one pass over the payload, in which the GIL is released.

    Args:
        buffer: header page, payload and padding; exactly `stored_bytes` long.
        object_id: the 36 bytes it was asked for by.
    Raises:
        CorruptObject: the message says which check failed.
        Incompatible: as `decode`.
    """
    view = memoryview(buffer)
    header = decode(view)
    if header.object_id != object_id:
        raise CorruptObject(f"holds object {header.object_id.hex()}, not {object_id.hex()}")
    expected = stored_bytes(header.stored_length)
    if view.nbytes != expected:
        raise CorruptObject(f"object of {view.nbytes} bytes; its header says {expected}")
    end = HEADER_BYTES + header.stored_length
    if view[end:].tobytes().strip(b"\0"):
        raise CorruptObject("padding behind the payload is not zero")
    if checksum(view[HEADER_BYTES:end]) != header.stored_checksum:
        raise CorruptObject("payload checksum does not match")
    return header


def object_id(key: bytes, group: int, rank: int) -> bytes:
    """36 bytes that name an object: chunk key, layer group, rank.

    Raises:
        UsageError: the key is not 32 bytes, or a number is not 0 to 65535.
    """
    if len(key) != 32:
        raise UsageError(f"chunk key of {len(key)} bytes, not 32")
    try:
        return _ID.pack(key, group, rank)
    except struct.error as error:
        raise UsageError(f"group {group} or rank {rank} is not 0 to 65535") from error


def split_object_id(object_id: bytes) -> tuple[bytes, int, int]:
    """Chunk key, layer group and rank of an object id.

    Raises:
        UsageError: not 36 bytes.
    """
    if len(object_id) != OBJECT_ID_BYTES:
        raise UsageError(f"object id of {len(object_id)} bytes, not {OBJECT_ID_BYTES}")
    key, group, rank = _ID.unpack(object_id)
    return key, group, rank


def stored_bytes(stored_length: int) -> int:
    """Bytes that an object takes with header page and padding, a multiple of 4096."""
    return HEADER_BYTES + -(-stored_length // HEADER_BYTES) * HEADER_BYTES


def checksum(buffer: Buffer) -> bytes:
    """XXH3-128 of contiguous bytes, 16 bytes.

    14 GB/s and more on one core. xxhash releases the GIL meanwhile (always since 3.0), so a thread
    that does this keeps nobody waiting.
    """
    return xxhash.xxh3_128_digest(buffer)
