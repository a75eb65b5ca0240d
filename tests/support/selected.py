"""Selected tokens for tests: drawn by a seed, as a payload, and as a whole object."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from kvstrata.codecs.base import Payload
from kvstrata.header import ObjectHeader
from kvstrata.layout import ITEM_BYTES, WORDS, Bytes
from kvstrata.objects import HEADER_BYTES, checksum, encode, stored_bytes
from kvstrata.selection import kept as k
from kvstrata.selection.kept import Kept
from kvstrata.testing.codecs import kv_like

CHUNK = 128


def drawn(
    seed: int = 0,
    counts: Any = ((2, 0, 3), (1, 4, 2)),
    dim: int = 4,
    dtype: str = "bfloat16",
    tokens: int = 40,
) -> Kept:
    """Tokens that a seed selects, with bits that it draws."""
    rng = np.random.default_rng(seed)
    kept = np.array(counts, np.int32)
    each = [np.sort(rng.choice(tokens, count, replace=False)) for count in kept.ravel()]
    item_bytes, rows = ITEM_BYTES[dtype], int(kept.sum())
    shape, top = (2, rows, dim), 1 << 8 * item_bytes
    keys, values = rng.integers(0, top, shape, np.uint64).astype(WORDS[item_bytes])
    return Kept(kept, np.concatenate(each).astype(np.int32), keys, values, dtype, tokens)


def alike(
    seed: int = 0, counts: Any = ((90, 0, 200), (7, 130, 1)), tokens: int = 2 * CHUNK
) -> Kept:
    """The same with numbers as KV has them, which codecs make smaller."""
    kept = drawn(seed, counts, 64, tokens=tokens)
    payload = Payload((1, 2, 1, kept.rows, 64), "bfloat16", 0)
    words = kv_like(payload, seed).view(np.uint16).reshape(2, kept.rows, 64)
    return Kept(kept.counts, kept.positions, words[0], words[1], kept.dtype, tokens)


def encoded(kept: Kept, rows: int = 0) -> Bytes:
    """Its payload, in memory that was something else before."""
    out = np.full(k.payload_bytes(kept.shape(rows), kept.dtype), 0xA5, np.uint8)
    k.encode(kept, out, rows)
    return out


def an_object(kept: Kept, rows: int = 0, **changes: object) -> memoryview:
    """A whole raw object of a context of whole chunks."""
    raw, shape = encoded(kept, rows), kept.shape(rows)
    fields = {
        "namespace": bytes(32),
        "key": b"k" * 32,
        "parent": b"p" * 32 if kept.prompt_tokens > CHUNK else bytes(32),
        "start": kept.prompt_tokens - CHUNK,
        "num_tokens": CHUNK,
        "group": 0,
        "rank": 0,
        "kind": "kept",
        "order": "",
        "dtype": kept.dtype,
        "shape": shape,
        "codec": "raw",
        "codec_parameters": b"",
        "epoch": 0,
        "created_ns": 0,
        "raw_length": len(raw),
        "stored_length": len(raw),
        "raw_checksum": checksum(raw.data),
        "stored_checksum": checksum(raw.data),
        "chunk_tokens": CHUNK,
        "group_kind": "recurrent",
        "boundary": kept.prompt_tokens,
        "positions": k.positions_digest(raw, shape),
        **changes,
    }
    header = ObjectHeader(**fields)  # type: ignore[arg-type]
    buffer = memoryview(mmap.mmap(-1, stored_bytes(len(raw))))
    buffer[:HEADER_BYTES] = encode(header)
    buffer[HEADER_BYTES : HEADER_BYTES + len(raw)] = raw.tobytes()
    return buffer
