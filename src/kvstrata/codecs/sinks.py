"""The prompt's first tokens, kept exact: attention sinks, on which every later token leans.

Source: KVSink, arXiv:2508.04257; differs: sinks are taken to be the first tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.base import Payload
from kvstrata.codecs.elements import Floats, from_float32, to_float32
from kvstrata.layout import Bytes, Elements

SINKS = 4
"""Tokens that are kept exact by default."""

_WORDS: dict[int, npt.DTypeLike] = {2: np.uint16, 4: np.uint32}


def num_exact(sinks: int, payload: Payload) -> int:
    """How many of the chunk's tokens are among the prompt's first ``sinks``."""
    return min(max(sinks - payload.start, 0), payload.shape[3])


def exact_bytes(count: int, payload: Payload) -> int:
    """Bytes of ``count`` exact tokens of a layer."""
    return payload.layer_elements // payload.shape[3] * count * payload.item_bytes


def store_exact(numbers: Floats, count: int, payload: Payload, out: Bytes) -> int:
    """Write the first ``count`` tokens of ``numbers`` (S, H, T, D); returns the bytes written."""
    first = np.ascontiguousarray(numbers[:, :, :count])
    words: Elements = np.empty(first.shape, _WORDS[payload.item_bytes])
    from_float32(first, payload.dtype, words)
    out[: words.nbytes] = words.reshape(-1).view(np.uint8)
    return exact_bytes(count, payload)


def load_exact(frame: Bytes, count: int, payload: Payload, out: Floats) -> int:
    """Read what `store_exact` wrote into the first tokens of ``out``; returns the bytes read.

    ``frame`` holds at least `exact_bytes`.
    """
    if count:
        states, heads, _, dim = out.shape
        size = exact_bytes(count, payload)
        words = frame[:size].copy().view(_WORDS[payload.item_bytes])
        out[:, :, :count] = to_float32(words, payload.dtype).reshape(states, heads, count, dim)
    return exact_bytes(count, payload)
