"""What is known of one object, and the rules that it keeps."""

from __future__ import annotations

import struct
from typing import Literal, TypeAlias

import msgspec

from kvstrata.errors import UsageError

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

Kind: TypeAlias = Literal["native", "portable", "kept"]
GroupKind: TypeAlias = Literal["full", "sliding", "chunked", "recurrent"]

KINDS: dict[Kind, int] = {"native": 1, "portable": 2, "kept": 3}
GROUP_KINDS: dict[GroupKind, int] = {"full": 1, "sliding": 2, "chunked": 3, "recurrent": 4}
"""As they are stored."""

_ID = struct.Struct("<32sHH")


class ObjectHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one object; ``docs/format.md`` gives each field's meaning.

    Lengths in bytes: ``namespace``, ``key`` and ``parent`` 32, checksums 16, ``order`` at most
    64, ``dtype`` and ``codec`` at most 32, ``codec_parameters`` at most 256; ``owner``,
    ``encryption_key`` and ``positions`` 16; ``marks`` 12 for every 16 tokens, or none. Building a
    header checks nothing; `kvstrata.objects.encode` and `decode` do.
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
        if self.kind not in KINDS:
            return f"kind {self.kind!r} is none of {', '.join(KINDS)}"
        if (self.kind == "native") != bool(self.order):
            return f"a {self.kind} payload with the order {self.order!r}"
        return self._problem_of_chunk() or self.problem_among_alike()

    def problem_among_alike(self) -> str:
        """The first rule on what differs between objects that are alike: place and lengths."""
        return self._problem_of_place() or self._problem_of_lengths()

    def _problem_of_chunk(self) -> str:
        if not self.num_tokens <= self.chunk_tokens <= MAX_CHUNK_TOKENS:
            return (
                f"{self.num_tokens} tokens of a chunk of {self.chunk_tokens}; a chunk has at most "
                f"{MAX_CHUNK_TOKENS}"
            )
        if len(self.marks) not in (0, self.num_tokens // MARK_TOKENS * MARK_BYTES):
            return f"marks of {len(self.marks)} bytes do not go with {self.num_tokens} tokens"
        if self.group_kind not in GROUP_KINDS:
            return f"group_kind {self.group_kind!r} is none of {', '.join(GROUP_KINDS)}"
        if self.kind != "kept" and self.positions != bytes(CHECKSUM_BYTES):
            return f"a {self.kind} payload with positions"
        if self.kind == "kept" and len(self.shape) != 5:
            return f"a kept payload of shape {self.shape}, not [L, S, H, R, D]"
        if self.kind == "kept" and self.group_kind != "recurrent":
            return f"a kept payload of a {self.group_kind} group: it stands for all before its end"
        return ""

    def _problem_of_place(self) -> str:
        if self.start == 0 and self.parent != NO_PARENT:
            return f"start 0 does not go with parent {self.parent.hex()}"
        looks_back = {"full": self.boundary == 0, "recurrent": self.boundary == self.end}
        if not looks_back.get(self.group_kind, self.boundary > 0):
            return f"a {self.group_kind} group with the boundary {self.boundary}"
        return ""

    def _problem_of_lengths(self) -> str:
        if self.stored_length == 0:
            return "stored_length is 0, not 1 to 2^64 - 1"
        sealed = self.encryption_key != NOT_ENCRYPTED
        if self.codec == "raw" and self.stored_length != self.raw_length + SEALED_BYTES * sealed:
            return f"raw, but {self.raw_length} bytes became {self.stored_length}"
        if self.codec == "raw" and not sealed and self.raw_checksum != self.stored_checksum:
            return "raw, but the two payload checksums differ"
        if sealed and self.stored_length <= SEALED_BYTES:
            return f"encrypted, in {self.stored_length} bytes"
        return ""


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
