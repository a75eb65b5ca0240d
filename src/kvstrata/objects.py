"""The stored format of an object: one header page that says all, then the payload.

``docs/format.md`` is the contract. A page decodes to exactly the header that encodes to it, so
there are no bytes on it that are not checked.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, TypeAlias

import msgspec
import xxhash

from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.header import (
    CHECKSUM_BYTES,
    GROUP_KINDS,
    KINDS,
    MARK_BYTES,
    MAX_DIMS,
    NO_PARENT,
    GroupKind,
    Kind,
    ObjectHeader,
)

Buffer: TypeAlias = bytes | bytearray | memoryview

FORMAT_VERSION = 2
HEADER_BYTES = 4096

_MAGIC = b"KVSTRATA"
_KIND_NAMES: dict[int, Kind] = {code: name for name, code in KINDS.items()}
_GROUP_KIND_NAMES: dict[int, GroupKind] = {code: name for name, code in GROUP_KINDS.items()}

_PREFIX = struct.Struct("<8sH")
_PAGE = struct.Struct("<8sHBBHH 16s 32s32s32s QII QQ16s16s QQ 8Q 64s32s32s 256s")
_SINCE_2 = struct.Struct("<16s IB3x Q16s16s I300x 3072s")
_CHECKSUM = slice(16, 32)
# What differs between objects that are alike: checksum, key, parent, start, stored length, payload
# checksums, epoch, time of creation; and marks.
_VARYING = struct.Struct("<16x16s32x32s32sQ16xQ16s16sQQ")
_PLACE = struct.Struct("<32s32sQ"), 64
_SUMS = struct.Struct("<16s16s"), 160
_STORED_LENGTH = struct.Struct("<Q"), 152
_NUM_MARKS = struct.Struct("<I"), _PAGE.size + 64
MAX_ALIKE = 256
"""Kinds of headers that are remembered, so that the next one is decoded in a third of the time."""
_alike: dict[bytes, ObjectHeader] = {}
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


def encode(header: ObjectHeader) -> bytes:
    """The header page, 4096 bytes.

    Raises:
        UsageError: a value the format does not allow; the message says which.
    """
    if problem := header.problem():
        raise UsageError(f"object header: {problem}")
    return _page(header, FORMAT_VERSION)


def _page(header: ObjectHeader, version: int) -> bytes:
    num_dims = len(header.shape)
    body = _PAGE.pack(
        _MAGIC,
        version,
        KINDS[header.kind],
        num_dims,
        header.group,
        header.rank,
        b"",
        header.namespace,
        header.key,
        header.parent,
        header.start,
        header.num_tokens,
        len(header.codec_parameters),
        header.raw_length,
        header.stored_length,
        header.raw_checksum,
        header.stored_checksum,
        header.epoch,
        header.created_ns,
        *header.shape,
        *(0,) * (MAX_DIMS - num_dims),
        header.order.encode(),
        header.dtype.encode(),
        header.codec.encode(),
        header.codec_parameters,
    )
    since_2 = bytes(_SINCE_2.size) if version == 1 else _since_2(header)
    digest = checksum(body + since_2)
    return body[: _CHECKSUM.start] + digest + body[_CHECKSUM.stop :] + since_2


def _since_2(header: ObjectHeader) -> bytes:
    return _SINCE_2.pack(
        header.owner,
        header.chunk_tokens,
        GROUP_KINDS[header.group_kind],
        header.boundary,
        header.encryption_key,
        header.positions,
        len(header.marks) // MARK_BYTES,
        header.marks,
    )


def page_like(
    page: bytes, key: bytes, parent: bytes, start: int, payload_checksum: bytes, marks: bytes
) -> bytes:
    """The header page of another raw object that differs in nothing but these; not checked.

    There are as many marks as on the page, and a state's boundary is none of what differs.
    """
    like = bytearray(page)
    (place, at), (sums, sums_at) = _PLACE, _SUMS
    place.pack_into(like, at, key, parent, start)
    sums.pack_into(like, sums_at, payload_checksum, payload_checksum)
    like[_MARKS : _MARKS + len(marks)] = marks
    like[_CHECKSUM] = bytes(CHECKSUM_BYTES)
    like[_CHECKSUM] = checksum(like)
    return bytes(like)


def decode(buffer: Buffer) -> ObjectHeader:
    """The header on the first 4096 bytes of ``buffer``, checked; its payload is not looked at.

    Raises:
        Incompatible: an unknown format version, or a kind of payload or group that this build does
            not know.
        CorruptObject: anything else that is not exactly what `encode` writes.
    """
    page = bytes(memoryview(buffer)[:HEADER_BYTES])
    if len(page) < HEADER_BYTES:
        raise CorruptObject(f"header page of {len(page)} bytes, not {HEADER_BYTES}")
    magic, version = _PREFIX.unpack_from(page)
    if magic != _MAGIC:
        raise CorruptObject(f"header begins with {magic!r}, not {_MAGIC!r}")
    if version not in (1, FORMAT_VERSION):
        raise Incompatible(f"object format version {version}; this build reads 1 and 2")
    zeroed = page[: _CHECKSUM.start] + bytes(CHECKSUM_BYTES) + page[_CHECKSUM.stop :]
    if checksum(zeroed) != page[_CHECKSUM]:
        raise CorruptObject("header checksum does not match")
    if version == 1:
        return _decode_whole(page, version)
    alike, marks = _without_varying(page)
    if (known := _alike.get(alike)) is not None:
        return _decode_varying(page, known, marks)
    header = _decode_whole(page, version)
    if len(_alike) >= MAX_ALIKE:
        _alike.clear()
    _alike[alike] = header
    return header


def _without_varying(page: bytes) -> tuple[bytes, bytes]:
    """What is the same on the pages of objects that are alike; and this one's marks."""
    fields, at = _NUM_MARKS
    end = _MARKS + fields.unpack_from(page, at)[0] * MARK_BYTES
    same = page[:16], page[32:64], page[136:152], page[208:_MARKS], page[end:]
    return b"".join(same), page[_MARKS:end]


def _decode_varying(page: bytes, known: ObjectHeader, marks: bytes) -> ObjectHeader:
    _, key, parent, start, length, raw_checksum, stored_checksum, epoch, created_ns = (
        _VARYING.unpack_from(page)
    )
    header = msgspec.structs.replace(
        known,
        key=key,
        parent=parent,
        start=start,
        stored_length=length,
        raw_checksum=raw_checksum,
        stored_checksum=stored_checksum,
        epoch=epoch,
        created_ns=created_ns,
        marks=marks,
    )
    if problem := header.problem_among_alike():
        raise CorruptObject(f"header: {problem}")
    return header


def _decode_whole(page: bytes, version: int) -> ObjectHeader:
    fields = _PAGE.unpack_from(page)
    kind, num_dims, parameters_length = fields[2], fields[3], fields[12]
    if kind not in _KIND_NAMES:
        known = ", ".join(f"{code} {name}" for name, code in KINDS.items())
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
    if _page(header, version) != page:
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
    if page[_GROUP_KIND_BYTE] != GROUP_KINDS["recurrent"]:
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
        known = ", ".join(f"{code} {name}" for name, code in GROUP_KINDS.items())
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


def verify_object(buffer: Buffer, object_id: bytes, made: bytes | None = None) -> ObjectHeader:
    """Check a whole object: header, identity, length, padding, payload checksum.

    Costs one pass over the payload, in which the GIL is released; unless that was made before.

    Args:
        buffer: header page, payload and padding; exactly `stored_bytes` long.
        object_id: the 36 bytes it was asked for by.
        made: the payload's checksum, where whoever brought these bytes here has made it of them.
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
    if (made or checksum(view[HEADER_BYTES:end])) != header.stored_checksum:
        raise CorruptObject("payload checksum does not match")
    return header


def payload_end(page: Buffer) -> int:
    """Where the payload behind a header page ends, as the page says, which is not checked here."""
    field, at = _STORED_LENGTH
    length: int = field.unpack_from(page, at)[0]
    return HEADER_BYTES + length


def stored_bytes(stored_length: int) -> int:
    """Bytes that an object takes with header page and padding, a multiple of 4096."""
    return HEADER_BYTES + -(-stored_length // HEADER_BYTES) * HEADER_BYTES


def checksum(buffer: Buffer) -> bytes:
    """XXH3-128 of contiguous bytes, 16 bytes.

    14 GB/s and more on one core. xxhash releases the GIL meanwhile (always since 3.0), so a thread
    that does this keeps nobody waiting.
    """
    return xxhash.xxh3_128_digest(buffer)
