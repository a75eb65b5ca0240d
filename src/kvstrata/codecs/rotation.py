"""The arithmetic of `rotated`: Walsh-Hadamard transform and Lloyd-Max levels.

A tile has the tokens of a group last, (H, D, tokens), so that every step of a transform over the D
channels adds and subtracts whole rows. Sums have a fixed order: the symbols are the same anywhere.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np
import numpy.typing as npt

from kvstrata.codecs.elements import Floats
from kvstrata.layout import Bytes

# Upper halves; found by Lloyd's algorithm on the normal distribution, to the last digit shown.
_LEVELS = {
    2: (0.4527800346, 1.5104176085),
    3: (0.2450941789, 0.7560052812, 1.3439092785, 2.1519457045),
    4: (
        0.1283950299,
        0.3880482995,
        0.6567591185,
        0.9423404565,
        1.2562311973,
        1.6180463860,
        2.0690172265,
        2.7325895710,
    ),
    5: (
        0.0658896598,
        0.1980518297,
        0.3313783058,
        0.4666995230,
        0.6049336240,
        0.7471357037,
        0.8945651174,
        1.0487833199,
        1.2118043806,
        1.3863403396,
        1.5762280786,
        1.7872332177,
        2.0287283994,
        2.3177394042,
        2.6911195774,
        3.2607324934,
    ),
}

_MAX_BLOCK = 4096


@cache
def levels_of(bits: int) -> Floats:
    """The levels, ascending, of 2 to 5 bits."""
    upper = _LEVELS[bits]
    return np.array([-x for x in reversed(upper)] + list(upper), np.float32)


def edges_of(levels: Floats) -> Floats:
    """The middles between neighbours: a number above k of them has symbol k."""
    edges: Floats = (levels[1:] + levels[:-1]) / np.float32(2)
    return edges


@cache
def signs(dim: int) -> Floats:
    """+1 and -1 by a fixed hash of the channel's number, (D,)."""
    words = np.arange(1, dim + 1, dtype=np.uint64)
    for _ in range(3):
        words = (words ^ words >> np.uint64(15)) * np.uint64(0x2C1B3C6D) & np.uint64(0xFFFFFFFF)
    return np.where(words >> np.uint64(31), -1, 1).astype(np.float32)


def rotate(numbers: Floats, begin: int, scale: float, sign: Floats, out: Floats) -> None:
    """Rotate a group of tokens.

    Args:
        numbers: (H, T, D).
        begin: the group's first token.
        scale: each number is multiplied by it first.
        sign: of `signs`.
        out: (H, D, tokens).
    """
    forward, _ = norms(len(sign))
    _to_tile(numbers, begin, sign * np.float32(scale * forward), out)
    _transform(out, block_of(len(sign)))


def quantise(
    tile: Floats, centre: bool, levels: Floats, symbols: Bytes
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Symbols (H, D, tokens) of a rotated tile; returns means (H, D), or none, and scales.

    Scales are (H, tokens). The tile is overwritten.
    """
    heads, dim, count = tile.shape
    means = np.zeros((heads, dim if centre else 0), np.float32)
    if centre:
        _take_means(tile, means)
        means = means.astype(np.float16).astype(np.float32)
        tile -= means[:, :, None]
    scales = np.empty((heads, count), np.float32)
    _quantise(tile, levels, edges_of(levels), scales, symbols)
    return means.astype(np.float16), scales.astype(np.float16)


def restore(
    symbols: Bytes,
    means: Floats,
    scales: Floats,
    levels: Floats,
    scale: float,
    sign: Floats,
    limit: float,
    begin: int,
    out: Floats,
) -> None:
    """Undo `quantise` and `rotate`.

    Args:
        symbols: (H, D, tokens), each less than the number of levels.
        means: (H, D) or (H, 0).
        scales: (H, tokens).
        levels, sign, begin: as there.
        scale: each number is multiplied by it at last.
        limit: of the magnitude of a number.
        out: (H, T, D).
    """
    heads, dim, _ = symbols.shape
    if not means.size:
        means = np.zeros((heads, dim), np.float32)
    factors, last = sign * np.float32(norms(dim)[1]), np.float32(scale)
    _restore(symbols, means, scales, levels, block_of(dim), factors, last, limit, begin, out)


def block_of(dim: int) -> int:
    """Channels that are mixed: the largest power of two that divides their number."""
    return min(dim & -dim, _MAX_BLOCK)


def norms(dim: int) -> tuple[float, float]:
    """Powers of two whose product undoes the growth in both directions: exact, so no rounding."""
    steps = block_of(dim).bit_length() - 1
    return 2.0 ** -((steps + 1) // 2), 2.0 ** -(steps // 2)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _to_tile(numbers: Floats, begin: int, factors: Floats, out: Floats) -> None:
    heads, dim, count = out.shape
    for head in range(heads):
        tokens = numbers[head, begin : begin + count]
        for d in range(dim):
            row, factor = out[head, d], factors[d]
            for i in range(count):
                row[i] = tokens[i, d] * factor


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _transform(tile: Floats, block: int) -> None:
    """Walsh-Hadamard transform over the channels of every ``block``, not normalised."""
    heads, dim, _ = tile.shape
    for head in range(heads):
        half = 1
        while half < block:
            for first in range(0, dim, 2 * half):
                for d in range(first, first + half):
                    above, below = tile[head, d], tile[head, d + half]
                    for i in range(len(above)):
                        x, y = above[i], below[i]
                        above[i] = x + y
                        below[i] = x - y
            half *= 2


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _take_means(tile: Floats, means: Floats) -> None:
    heads, dim, count = tile.shape
    for head in range(heads):
        for d in range(dim):
            total = np.float32(0)
            for x in tile[head, d]:
                total += x
            means[head, d] = total / np.float32(count)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _quantise(tile: Floats, levels: Floats, edges: Floats, scales: Floats, symbols: Bytes) -> None:
    heads, dim, count = tile.shape
    zero = np.float32(0)
    power, inverse, cross = np.empty((3, count), np.float32)
    unit = np.empty(count, np.float32)
    for head in range(heads):
        power[:] = zero
        cross[:] = zero
        for d in range(dim):
            row = tile[head, d]
            for i in range(count):
                power[i] += row[i] * row[i]
        for i in range(count):
            size = np.sqrt(power[i] / np.float32(dim))
            inverse[i] = np.float32(1) / size if size > zero else zero
        for d in range(dim):
            row, codes = tile[head, d], symbols[head, d]
            codes[:] = 0
            for i in range(count):
                unit[i] = row[i] * inverse[i]
            for edge in edges:
                for i in range(count):
                    codes[i] += np.uint8(unit[i] > edge)
            for i in range(count):
                cross[i] += row[i] * levels[codes[i]]
        for i in range(count):
            scales[head, i] = power[i] / cross[i] if cross[i] > zero else zero


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _restore(
    symbols: Bytes,
    means: Floats,
    scales: Floats,
    levels: Floats,
    block: int,
    factors: Floats,
    scale: float,
    limit: float,
    begin: int,
    out: Floats,
) -> None:
    heads, dim, count = symbols.shape
    tile = np.empty((1, dim, count), np.float32)  # of a head: the nearest cache holds it
    for head in range(heads):
        size = scales[head]
        for d in range(dim):
            row, codes, mean = tile[0, d], symbols[head, d], means[head, d]
            for i in range(count):
                row[i] = levels[codes[i]]
            for i in range(count):
                row[i] = mean + row[i] * size[i]
        _transform(tile, block)
        for d in range(dim):
            row, factor = tile[0, d], factors[d]
            for i in range(count):
                # The power of two comes last: before it, no sum can overflow.
                x = row[i] * factor * scale
                x = x if x < limit else limit
                row[i] = x if x > -limit else -limit
        for i in range(count):
            token = out[head, begin + i]
            for d in range(dim):
                token[d] = tile[0, d, i]
