"""Signposts: where the KV of a text is kept, by what the text says and not by what came before it.

KV is stored once, under the keys of the prompt that it was computed in. A signpost is a small
object beside it, whose key is a keyed hash of the text's tokens alone, and which names the chunks
that hold them. A text has one, and some more for the other prompts that it was computed in: its
places, which say besides what came before it there. ``docs/keys.md`` and ``docs/format.md`` are the
contract.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from kvstrata.blend.anchors import SKETCH_BYTES
from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.keys import KEY_BYTES, Tokens, token_ids
from kvstrata.secret import SECRET_BYTES

VERSION = 1
PLACE_VERSION = 2
"""Of the signpost of a place."""
PLACES = 3
"""Of a text, numbered from 1; 0 is its signpost, wherever that leads."""
GROUP = 4095
"""The layer group of a signpost, which no layers have."""
PART = GROUP << 16
ORDER = "kvstrata-signpost-1"
"""The name of its byte order."""

_KEY_CONTEXT = "KVStrata 1 signposts"
_SEAL_CONTEXT = "KVStrata 1 signpost seals"
_COVER_CONTEXT = "KVStrata 1 signpost covers"
_HEAD = struct.Struct("<IIQ32s")
_MAX_POSITION = 1 << 40
_NO_KEY = bytes(KEY_BYTES)


@dataclass(frozen=True)
class Signpost:
    """Where a text's KV is.

    Args:
        start: position of its first token in the prompt that it was computed in.
        keys: of the chunks of that prompt that hold it, from the one with its first token on;
            perhaps not up to its last.
        before: of a place, `kvstrata.blend.anchors.sketch` of what lies before it there; empty in
            a text's first signpost.
    """

    start: int
    keys: tuple[bytes, ...]
    before: bytes = b""

    @property
    def place(self) -> int:
        """Which of the text's places this is the signpost of, 1 to `PLACES`.

        The key of the chunk with its first token covers all that comes before, so that who
        computes a text behind the same tokens again comes to the same place, on any machine. It
        covers that whole chunk: of a text that ends in it, what follows the text counts, too.
        """
        return 1 + int.from_bytes(self.keys[0][:4], "little") % PLACES


class Signposts:
    """Keys and payloads of the signposts of one namespace and salt.

    Args:
        secret: one of the deployment's, 32 bytes.
        namespace: `kvstrata.keys.Namespace.digest`.
        chunk_tokens: tokens of a chunk there.
        salt: the request's, empty if it has none.
    Raises:
        UsageError: a wrong length, or a salt that UTF-8 cannot encode.
    """

    def __init__(self, secret: bytes, namespace: bytes, chunk_tokens: int, salt: str = "") -> None:
        if len(secret) != SECRET_BYTES or len(namespace) != KEY_BYTES:
            raise UsageError(f"secret of {len(secret)} bytes, namespace of {len(namespace)}")
        try:
            material = secret + salt.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{salt!r} cannot be encoded in UTF-8: {error.reason}") from error
        self.chunk_tokens = chunk_tokens
        self._namespace = bytes(namespace)
        self._keyed = blake3(material, derive_key_context=_KEY_CONTEXT).digest()
        self._sealed = blake3(material, derive_key_context=_SEAL_CONTEXT).digest()
        self._covered = blake3(material, derive_key_context=_COVER_CONTEXT).digest()

    def key(self, tokens: Tokens, place: int = 0) -> bytes:
        """Key of the signpost of a text, 32 bytes.

        Args:
            tokens: ids of the text, each 0 to 2^31 - 1.
            place: 0: the text's; 1 to `PLACES`: that of one of its places.
        Raises:
            UsageError: an id out of range.
        """
        ids = token_ids(tokens)
        row = np.concatenate([[len(ids)], ids, [place] if place else []]).astype("<u4").tobytes()
        return blake3(self._namespace + row, key=self._keyed, max_threads=1).digest()

    def payload_bytes(self, num_tokens: int, place: int = 0) -> int:
        """Length of the payload for a text of so many tokens, wherever in a prompt it lies."""
        most = (num_tokens + self.chunk_tokens - 2) // self.chunk_tokens + 1
        return _HEAD.size + (SKETCH_BYTES if place else 0) + most * KEY_BYTES

    def encode(self, key: bytes, signpost: Signpost, num_tokens: int) -> bytes:
        """The payload.

        Args:
            key: of the signpost.
            signpost: to encode.
            num_tokens: of the text.
        Raises:
            UsageError: it is none of such a text.
        """
        if problem := self._problem(signpost, num_tokens):
            raise UsageError(f"signpost: {problem}")
        keys = b"".join(signpost.keys).ljust(self.payload_bytes(num_tokens) - _HEAD.size, b"\0")
        count, version = len(signpost.keys), PLACE_VERSION if signpost.before else VERSION
        rest = self._cover(key, signpost.before, keys) + keys
        seal = self._seal(key, _HEAD.pack(version, count, signpost.start, b""), rest)
        return _HEAD.pack(version, count, signpost.start, seal) + rest

    def decode(self, key: bytes, payload: bytes, num_tokens: int, place: int = 0) -> Signpost:
        """What `encode` made a payload of, with the same key and length.

        Args:
            key, payload, num_tokens: as of `encode`.
            place: as of `key`.
        Raises:
            Incompatible: it is of another version.
            CorruptObject: it is anything else.
        """
        if len(payload) != self.payload_bytes(num_tokens, place):
            raise CorruptObject(f"a signpost of {len(payload)} bytes for {num_tokens} tokens")
        version, count, start, seal = _HEAD.unpack_from(payload)
        wanted = PLACE_VERSION if place else VERSION
        if version != wanted:
            raise Incompatible(f"signpost version {version}; this build reads {wanted} here")
        rest = payload[_HEAD.size :]
        if seal != self._seal(key, _HEAD.pack(version, count, start, b""), rest):
            raise CorruptObject("nobody who knows the secret wrote this signpost")
        size = SKETCH_BYTES if place else 0
        keys = rest[size:]
        stop = count * KEY_BYTES
        found = tuple(keys[at : at + KEY_BYTES] for at in range(0, stop, KEY_BYTES))
        signpost = Signpost(start, found, self._cover(key, rest[:size], keys))
        if any(keys[stop:]):
            raise CorruptObject("a signpost with bytes behind its keys")
        if problem := self._problem(signpost, num_tokens):
            raise CorruptObject(f"signpost: {problem}")
        return signpost

    def _seal(self, key: bytes, head: bytes, rest: bytes) -> bytes:
        return blake3(key + head + rest, key=self._sealed, max_threads=1).digest()

    def _cover(self, key: bytes, sketch: bytes, keys: bytes) -> bytes:
        """A sketch covered or uncovered; of equal keys it is the same one, so no pad serves two."""
        if not sketch:
            return b""
        pad = blake3(key + keys, key=self._covered, max_threads=1).digest(len(sketch))
        return bytes(one ^ other for one, other in zip(sketch, pad, strict=True))

    def _problem(self, signpost: Signpost, num_tokens: int) -> str:
        if not 0 <= signpost.start <= _MAX_POSITION:
            return f"a text that starts at {signpost.start}"
        chunks = covering(range(signpost.start, signpost.start + num_tokens), self.chunk_tokens)
        if not 1 <= len(signpost.keys) <= len(chunks):
            return f"{len(signpost.keys)} chunks hold a text that {len(chunks)} can hold"
        if len(set(signpost.keys)) < len(signpost.keys) or _NO_KEY in signpost.keys:
            return "chunks that are no prompt's"
        if any(len(key) != KEY_BYTES for key in signpost.keys):
            return "a key of another length"
        if len(signpost.before) not in (0, SKETCH_BYTES):
            return f"a sketch of {len(signpost.before)} bytes"
        return ""


def covering(tokens: range, chunk_tokens: int) -> range:
    """Numbers of the chunks that hold these positions; at least one position."""
    return range(tokens.start // chunk_tokens, (tokens.stop - 1) // chunk_tokens + 1)
