"""A codec on real KV as a node would use it: chunk by chunk, through the format of layers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.base import Codec, Payload
from kvstrata.codecs.elements import to_float32
from kvstrata.codecs.framing import decode, encode, encoded_bound
from kvstrata.layout import Bytes, Elements
from kvstrata.quality.models import DTYPE

CHUNK_TOKENS = 128

_TIMED_CHUNKS = 4
_RUNS = 5
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Coded:
    """What came back of a context.

    Args:
        kv: (L, 2, H, T, D), words; tokens behind the last whole chunk are untouched.
        nbytes: encoded bytes of each chunk.
        squares: (chunks, 2, L, 2): squared error, and squared numbers, of keys and of values.
        chunk_tokens: of each chunk.
    """

    kv: Elements
    nbytes: npt.NDArray[np.int64]
    squares: npt.NDArray[np.float64]
    chunk_tokens: int = CHUNK_TOKENS

    def bits(self, length: int) -> float:
        """Bits of an element, over the chunks of the first ``length`` tokens."""
        layers, states, heads, _, dim = self.kv.shape
        chunks = length // self.chunk_tokens
        elements: int = layers * states * heads * chunks * self.chunk_tokens * dim
        return 8 * int(self.nbytes[:chunks].sum()) / elements

    def error(self, length: int, state: int) -> float:
        """Root of the mean squared error over that of the numbers: the mean of the layers'."""
        error, size = self.squares[: length // self.chunk_tokens, :, :, state].sum(axis=0)
        return float(np.sqrt(error / np.maximum(size, np.finfo(float).tiny)).mean())


def through(codec: Codec, kv: Elements) -> Coded:
    """Encode and decode every whole chunk of a context; see `Coded`.

    Args:
        codec: the method.
        kv: (L, 2, H, T, D), words of bfloat16, of a prompt from its beginning.
    Raises:
        LayoutMismatch: the codec does not take this KV.
    """

    def one(words: Elements, start: int) -> tuple[int, Elements]:
        payload, raw = _payload(words, start)
        encoded = np.empty(encoded_bound(codec, payload), np.uint8)
        size = encode(codec, payload, raw, encoded)
        out = np.empty_like(raw)
        decode(codec, payload, encoded[:size], out)
        return size, out.view(np.uint16).reshape(payload.shape)

    # In threads, as a node does it; chunks know nothing of each other.
    return by_chunk(one, kv, CHUNK_TOKENS, len(os.sched_getaffinity(0)))


def by_chunk(
    code: Callable[[Elements, int], tuple[int, Elements]],
    kv: Elements,
    chunk_tokens: int,
    threads: int = 1,
) -> Coded:
    """Put every whole chunk of a context through anything; see `Coded`.

    Args:
        code: of a chunk (L, 2, H, T, D), contiguous, and the position where it begins: its encoded
            bytes, and what comes back of it.
        kv: (L, 2, H, T, D), words of bfloat16.
        chunk_tokens: of each.
        threads: in which ``code`` runs.
    """
    back = kv.copy()

    def one(start: int) -> tuple[int, list[npt.NDArray[np.float64]]]:
        part = (..., slice(start, start + chunk_tokens), slice(None))
        words = np.ascontiguousarray(kv[part])
        size, decoded = code(words, start)
        back[part] = decoded
        return size, _squares(words, decoded)

    starts = range(0, kv.shape[3] // chunk_tokens * chunk_tokens, chunk_tokens)
    with ThreadPoolExecutor(threads) as pool:
        sizes, squares = zip(*pool.map(one, starts), strict=True)
    return Coded(back, np.array(sizes), np.array(squares), chunk_tokens)


def _squares(words: Elements, decoded: Elements) -> list[npt.NDArray[np.float64]]:
    """Squared error, and squared numbers, of (L, 2)."""
    layers, states = words.shape[:2]
    error, size = np.empty((layers, states)), np.empty((layers, states))
    # State by state, so that what is in between stays in the processor's cache.
    for layer, state in np.ndindex(layers, states):
        exact = to_float32(words[layer, state], DTYPE)
        lost = to_float32(decoded[layer, state], DTYPE) - exact
        error[layer, state] = np.square(lost).sum(dtype=np.float64)
        size[layer, state] = np.square(exact).sum(dtype=np.float64)
    return [error, size]


def speeds(codec: Codec, kv: Elements) -> tuple[float, float]:
    """Encode and decode, in GB of raw KV per second of one thread's processor time.

    Chunks from all over the context, warm, each the fastest of five runs.
    """
    starts = np.linspace(0, kv.shape[3] // CHUNK_TOKENS - 1, _TIMED_CHUNKS).astype(int)
    chunks = [chunk(kv, CHUNK_TOKENS * int(start)) for start in starts]
    best = np.full((2, len(chunks)), math.inf)
    began = time.monotonic()
    for _ in range(_RUNS):
        for i, (payload, raw) in enumerate(chunks):
            encoded, out = np.empty(encoded_bound(codec, payload), np.uint8), np.empty_like(raw)
            times = [time.thread_time()]
            size = encode(codec, payload, raw, encoded)
            times.append(time.thread_time())
            decode(codec, payload, encoded[:size], out)
            times.append(time.thread_time())
            best[:, i] = np.minimum(best[:, i], np.diff(times))
        if time.monotonic() - began > _PATIENCE_S:
            break
    total = sum(payload.nbytes for payload, _ in chunks)
    encoding, decoding = total / np.maximum(best.sum(axis=1), 1e-9) / 1e9
    return float(encoding), float(decoding)


def chunk(kv: Elements, start: int) -> tuple[Payload, Bytes]:
    """The chunk that begins at a token, as the portable payload that a node would store."""
    return _payload(np.ascontiguousarray(kv[:, :, :, start : start + CHUNK_TOKENS]), start)


def _payload(words: Elements, start: int) -> tuple[Payload, Bytes]:
    layers, states, heads, tokens, dim = words.shape
    payload = Payload((layers, states, heads, tokens, dim), DTYPE, start)
    return payload, words.reshape(-1).view(np.uint8)
