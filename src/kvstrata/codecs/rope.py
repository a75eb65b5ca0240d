"""Rotary position embedding, undone and done again: channels i and i + D/2 turn as a pair.

That is the half-split order of Llama and its kin ("NeoX"), in which engines keep keys. Angles are
``position * frequency``, in float64, so that a position of a million is as exact as the first.

Source: RoFormer, arXiv:2104.09864.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np

from kvstrata.codecs.elements import Floats


class Angles(NamedTuple):
    """Cosines and sines, (T, D/2) each."""

    cos: Floats
    sin: Floats


@lru_cache(maxsize=64)
def angles(frequencies: bytes, start: int, count: int) -> Angles:
    """The turns of ``count`` positions from ``start`` on.

    Args:
        frequencies: radians a token, float64 x D/2, as bytes so that layers share an answer.
        start: position of the first token in its prompt.
        count: T.
    """
    turns = np.arange(start, start + count, dtype=np.float64)[:, None]
    turns = turns * np.frombuffer(frequencies, np.float64)
    return Angles(np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32))


@lru_cache(maxsize=64)
def still(count: int, dim: int) -> Angles:
    """The turns of what does not turn: values."""
    return Angles(np.ones((count, dim // 2), np.float32), np.zeros((count, dim // 2), np.float32))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def unrotate(heads: Floats, cos: Floats, sin: Floats, out: Floats) -> None:
    """Turn keys back to position 0: ``heads`` (H, T, D), any strides, into ``out`` (T, H, D)."""
    num_heads, num_tokens, dim = heads.shape
    half = dim // 2
    for token in range(num_tokens):
        for head in range(num_heads):
            for i in range(half):
                a, b = heads[head, token, i], heads[head, token, half + i]
                c, s = cos[token, i], sin[token, i]
                out[token, head, i] = a * c + b * s
                out[token, head, half + i] = b * c - a * s


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def rotate(tokens: Floats, cos: Floats, sin: Floats, limit: float, out: Floats) -> None:
    """Turn keys to their positions: ``tokens`` (T, H, D) into ``out`` (H, T, D), any strides.

    Nothing leaves ``-limit`` to ``limit``: rounding to a narrower dtype must not make infinities.
    """
    num_tokens, num_heads, dim = tokens.shape
    half = dim // 2
    low, high = np.float32(-limit), np.float32(limit)
    for head in range(num_heads):
        for token in range(num_tokens):
            for i in range(half):
                a, b = tokens[token, head, i], tokens[token, head, half + i]
                c, s = cos[token, i], sin[token, i]
                out[head, token, i] = min(max(a * c - b * s, low), high)
                out[head, token, half + i] = min(max(b * c + a * s, low), high)
