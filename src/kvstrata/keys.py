"""From token ids to chunk keys: a keyed hash chain that starts in a namespace.

``docs/keys.md`` is the contract. Nothing here depends on the process, the machine or Python's own
hash, so everybody who holds the deployment's secret derives the same keys.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstrata.errors import UsageError
from kvstrata.header import MARK_BYTES, MARK_TOKENS
from kvstrata.secret import SECRET_BYTES

KEY_BYTES = 32
OWNER_BYTES = 16

Tokens: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]

_NAMESPACE_VERSION = "kvstrata namespace 1"
_CHAIN_CONTEXT = "KVStrata 1 chunk keys"
_MARK_CONTEXT = "KVStrata 1 marks"
_OWNER_CONTEXT = "KVStrata 1 owners"
_MAX_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class Namespace:
    """What must be equal before two caches may share a key.

    Args:
        model: `kvstrata.identity.model_fingerprint`.
        layout: the logical KV layout of all groups, in one canonical text.
        chunk_tokens: tokens of a chunk.
        tensor_parallel, pipeline_parallel, context_parallel: sizes of the topology.
        adapter: `kvstrata.identity.adapter_identity`, or empty.
        tenant: whose cache it is, or empty.
        slices: into how many a layer's KV heads are cut, where all tensor-parallel sizes share them
            (``tensor_parallel`` is 1 then); 0: they are those of one size.
        pages: whether its keys are those of pages (`kvstrata.pagekeys`), not of a `KeyChain`.
        selection: by which method, with which parameters, tokens were selected; empty: all are
            there.
    Raises:
        UsageError: an empty model or layout, or a size below 1.
    """

    model: str
    layout: str
    chunk_tokens: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    adapter: str = ""
    tenant: str = ""
    slices: int = 0
    pages: bool = False
    selection: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("slices", "pages") else 1
            if isinstance(value, int) and value < least:
                raise UsageError(f"namespace: {field.name} is {value}, not at least {least}")
        if self.slices and self.tensor_parallel > 1:
            raise UsageError("namespace: what every tensor-parallel size shares names no size")
        for name in ("model", "layout"):
            if not getattr(self, name):
                raise UsageError(f"namespace: {name} is empty")

    def digest(self) -> bytes:
        """32 bytes; every field changes them.

        Raises:
            UsageError: a text that UTF-8 cannot encode.
        """
        ordered = (
            _NAMESPACE_VERSION,
            self.model,
            self.layout,
            f"shared {self.slices}" if self.slices else str(self.tensor_parallel),
            str(self.pipeline_parallel),
            str(self.context_parallel),
            f"pages {self.chunk_tokens}" if self.pages else str(self.chunk_tokens),
            self.adapter,
            self.tenant,
            *((f"selection {self.selection}",) if self.selection else ()),
        )
        return blake3(b"".join(map(length_prefixed, ordered))).digest()


class MediaItem(NamedTuple):
    """An image, sound or video in a prompt.

    ``identifier`` is its content hash, ``offset`` the position in the prompt of its first
    placeholder token, ``length`` how many tokens it covers.
    """

    identifier: str
    offset: int
    length: int


class KeyChain:
    """Chunk keys of one namespace and salt; make one and use it for many prompts.

    Stateless after construction, so threads may share it.

    Args:
        secret: one of the deployment's, 32 bytes, see `kvstrata.secret.load_secrets`.
        namespace: ``Namespace.digest()``.
        chunk_tokens: tokens of a chunk.
        salt: the request's, empty if it has none.
    Raises:
        UsageError: a wrong length, a size below 1, or a salt that UTF-8 cannot encode.
    """

    def __init__(self, secret: bytes, namespace: bytes, chunk_tokens: int, salt: str = "") -> None:
        if len(secret) != SECRET_BYTES:
            raise UsageError(f"secret of {len(secret)} bytes, not {SECRET_BYTES}")
        if len(namespace) != KEY_BYTES:
            raise UsageError(f"namespace digest of {len(namespace)} bytes, not {KEY_BYTES}")
        if chunk_tokens < 1:
            raise UsageError(f"chunk_tokens {chunk_tokens}: expected at least 1")
        self.chunk_tokens = chunk_tokens
        self._namespace = bytes(namespace)
        material = secret + _utf8(salt)
        self._hasher = _hasher(material, _CHAIN_CONTEXT)
        self._marker = _hasher(material, _MARK_CONTEXT)

    def keys(
        self,
        tokens: Tokens,
        media: Sequence[MediaItem] = (),
        start: int = 0,
        parent: bytes | None = None,
    ) -> list[bytes]:
        """Keys of the whole chunks of ``tokens``; what is left over has none.

        Args:
            tokens: ids from position ``start`` of the prompt on, each 0 to 2^31 - 1. An integer
                array is fastest; a list costs about 16 ns a token more.
            media: items of the prompt in any order, offsets counted from the prompt's start.
                Those that overlap no chunk here change nothing.
            start: a multiple of ``chunk_tokens``.
            parent: key of the chunk that ends at ``start``; given exactly if ``start`` is not 0.
        Returns:
            One 32-byte key a chunk.
        Raises:
            UsageError: an id out of range (the message names its index in ``tokens``), or an
                argument that breaks a rule above.
        """
        size = self.chunk_tokens
        key = self._parent_key(start, parent)
        ids = token_ids(tokens)
        items = media_by_chunk(media, start, size, len(ids) // size) if media else {}
        return _chained(self._hasher, _rows(ids, size), size, key, items)

    def tail(
        self,
        tokens: Tokens,
        media: Sequence[MediaItem] = (),
        start: int = 0,
        parent: bytes | None = None,
    ) -> bytes:
        """Key of the end of a prompt that is shorter than a chunk.

        Args:
            tokens: its ids, at least one and fewer than a chunk's.
            media, start, parent: as of `keys`.
        Raises:
            UsageError: as `keys` does, or it is no such end.
        """
        ids = token_ids(tokens)
        if not 0 < len(ids) < self.chunk_tokens:
            raise UsageError(f"a tail of {len(ids)} tokens; expected 1 to {self.chunk_tokens - 1}")
        key = self._parent_key(start, parent)
        items = media_by_chunk(media, start, self.chunk_tokens, 1) if media else {}
        number, encoded = items.get(0, (0, b""))
        row = np.array([len(ids), *ids, number], "<u4").tobytes()
        hasher = self._hasher.copy()
        hasher.update(key + row + encoded)
        return hasher.digest()

    def marks(
        self,
        tokens: Tokens,
        parents: Sequence[bytes | None],
        media: Sequence[MediaItem] = (),
        start: int = 0,
    ) -> list[bytes]:
        """Marks of chunks that follow each other, and of the beginning of one behind them.

        About 1 us a mark.

        Args:
            tokens: ids from the first of these chunks on; of the last one there may be fewer.
            parents: for each of them the key of the chunk before it; None before the first of all.
            media, start: as of `keys`.
        Returns:
            For each of ``parents`` 12 bytes for every 16 tokens that there are.
        Raises:
            UsageError: as `keys` does.
        """
        ids, size = token_ids(tokens), self.chunk_tokens
        # All at once: to set up one array for each chunk costs as much as its hashes.
        whole, each = len(ids) // size, size // MARK_TOKENS
        chunks = ids[: whole * size].reshape(whole, size)[:, : each * MARK_TOKENS]
        rows = _rows(np.concatenate((chunks.ravel(), ids[whole * size :])), MARK_TOKENS)
        nbytes = each * _row_bytes(MARK_TOKENS)
        marks = []
        for number, parent in enumerate(parents):
            begin = start + number * size
            key = self._parent_key(begin, parent)
            some = rows[number * nbytes : (number + 1) * nbytes]
            items = media_by_chunk(media, begin, MARK_TOKENS, each) if media else {}
            steps = _chained(self._marker, some, MARK_TOKENS, key, items)
            marks.append(b"".join([step[:MARK_BYTES] for step in steps]))
        return marks

    def _parent_key(self, start: int, parent: bytes | None) -> bytes:
        """What a chunk that begins at ``start`` is chained to."""
        size = self.chunk_tokens
        if start < 0 or start % size:
            raise UsageError(f"start {start} is not a multiple of chunk_tokens {size}")
        if (parent is None) != (start == 0):
            raise UsageError(f"start {start} and parent must be given together")
        key = self._namespace if parent is None else parent
        if len(key) != KEY_BYTES:
            raise UsageError(f"parent of {len(key)} bytes, not {KEY_BYTES}")
        return key


def _hasher(material: bytes, context: str) -> blake3:
    """A keyed hash, whose key is derived in this context."""
    return blake3(key=blake3(material, derive_key_context=context).digest(), max_threads=1)


def _row_bytes(size: int) -> int:
    return 4 * (size + 2)


def _rows(ids: npt.NDArray[np.integer[Any]], size: int) -> memoryview:
    """Of each whole piece of ``size`` tokens: their number, they, and that it has no media."""
    count = len(ids) // size
    rows = np.zeros((count, size + 2), "<u4")
    rows[:, 0] = size
    rows[:, 1:-1] = ids[: count * size].reshape(count, size)
    return rows.data.cast("B") if count else memoryview(b"")


def _chained(
    hasher: blake3,
    rows: memoryview,
    size: int,
    key: bytes,
    items: Mapping[int, tuple[int, bytes]],
) -> list[bytes]:
    """The chain of pieces of ``size`` tokens, each hashed behind the one before it.

    Args:
        rows: see `_rows`.
        key: what the first of them is chained to.
        items: the media items of pieces by number, see `media_by_chunk`.
    """
    chain: list[bytes] = []
    piece, nbytes = hasher.copy(), _row_bytes(size)
    for number in range(len(rows) // nbytes):
        row = rows[number * nbytes : (number + 1) * nbytes]
        piece.reset()
        if number in items:
            num_items, encoded = items[number]
            piece.update(key + row[:-4] + struct.pack("<I", num_items) + encoded)
        else:
            piece.update(key + row)
        key = piece.digest()
        chain.append(key)
    return chain


def owner_digest(secret: bytes, tenant: str, salt: str) -> bytes:
    """Whose objects a request's are, without saying who: 16 bytes for the header.

    Args:
        secret: the deployment's, 32 bytes.
        tenant: as in the namespace.
        salt: the request's, empty if it has none.
    Raises:
        UsageError: a text that UTF-8 cannot encode.
    """
    key = blake3(secret, derive_key_context=_OWNER_CONTEXT).digest()
    return blake3(length_prefixed(tenant) + length_prefixed(salt), key=key).digest(OWNER_BYTES)


def length_prefixed(text: str) -> bytes:
    """``text`` in UTF-8 behind its length in bytes (32-bit little endian).

    Raises:
        UsageError: UTF-8 cannot encode it.
    """
    encoded = _utf8(text)
    return struct.pack("<I", len(encoded)) + encoded


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{text!r} cannot be encoded in UTF-8: {error.reason}") from error


def token_ids(tokens: Tokens) -> npt.NDArray[np.integer[Any]]:
    """One flat array of checked ids."""
    if isinstance(tokens, np.ndarray):
        ids = tokens
    elif isinstance(tokens, (bytes, bytearray)):
        raise UsageError("token ids given as raw bytes: expected whole numbers")
    else:
        try:
            # Two thirds of np.asarray's time, and it refuses what is not a whole number.
            ids = np.frombuffer(array("q", tokens), np.int64)
        except (TypeError, OverflowError):
            raise UsageError(_first_bad(tokens)) from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError(f"token ids of shape {ids.shape}, {ids.dtype}: expected flat integers")
    if ids.size and (ids.min() < 0 or ids.max() > _MAX_TOKEN):
        raise UsageError(_first_bad(ids.tolist()))
    return ids


def _first_bad(tokens: Sequence[object]) -> str:
    for index, token in enumerate(tokens):
        if not hasattr(token, "__index__"):
            return f"token {index} is {token!r}, not a whole number"
        if not 0 <= token.__index__() <= _MAX_TOKEN:
            return f"token {index} is {token!r}, not 0 to {_MAX_TOKEN}"
    return "token ids must be a flat sequence of whole numbers"


def media_by_chunk(
    media: Sequence[MediaItem], start: int, size: int, count: int
) -> dict[int, tuple[int, bytes]]:
    """For each chunk that items overlap: how many, and their encoding."""
    found: dict[int, list[bytes]] = {}
    for item in sorted(media, key=lambda item: (item.offset, item.length, item.identifier)):
        if item.offset < 0 or item.length < 1:
            raise UsageError(f"{item}: offset must be at least 0 and length at least 1")
        identifier = length_prefixed(item.identifier)
        first = max((item.offset - start) // size, 0)
        last = min((item.offset + item.length - 1 - start) // size, count - 1)
        for chunk in range(first, last + 1):
            offset = item.offset - start - chunk * size
            found.setdefault(chunk, []).append(identifier + struct.pack("<qQ", offset, item.length))
    return {chunk: (len(items), b"".join(items)) for chunk, items in found.items()}
