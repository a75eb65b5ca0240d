"""The arithmetic of `quantized`: ranges of groups, nearest symbols, numbers again.

Encoding works on columns, (H, N, C): a group is neighbours along N, and loops run along C. Nothing
is rounded or summed in an order that a machine could choose: the symbols are the same anywhere.
"""

from __future__ import annotations

import numba
import numpy as np

from kvstrata.codecs.elements import Floats
from kvstrata.layout import Bytes

ROUNDS = 3


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def min_max(columns: Floats, group: int, top: int, low: Floats, step: Floats) -> None:
    """The range of each group from its smallest to its largest number."""
    heads, count, across = columns.shape
    high = np.empty(across, np.float32)
    for head in range(heads):
        for g in range(low.shape[1]):
            begin, end = g * group, min((g + 1) * group, count)
            for c in range(across):
                low[head, g, c] = high[c] = columns[head, begin, c]
            for n in range(begin + 1, end):
                for c in range(across):
                    x = columns[head, n, c]
                    low[head, g, c] = x if x < low[head, g, c] else low[head, g, c]
                    high[c] = x if x > high[c] else high[c]
            for c in range(across):
                step[head, g, c] = (high[c] - low[head, g, c]) / np.float32(top)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def fit_ranges(
    columns: Floats, group: int, top: int, first: float, low: Floats, step: Floats
) -> None:
    """Fit each range to its numbers: clip the far ones, and keep the whole unbiased.

    Symbols and range are fitted to each other in turn, as in Lloyd's algorithm. The last step is
    not that of least squares, which makes every number a little smaller: attention averages errors
    of many values away, but not a bias. It keeps the projection on the numbers themselves.
    """
    heads, count, across = columns.shape
    mean, power, inverse = np.empty((3, across), np.float32)
    total, square, cross = np.empty((3, across), np.float32)
    half, zero, one, most = np.float32(0.5), np.float32(0), np.float32(1), np.float32(top)
    shrink = np.float32(first)
    for head in range(heads):
        for g in range(low.shape[1]):
            begin, end = g * group, min((g + 1) * group, count)
            size = np.float32(end - begin)
            mean[:] = zero
            power[:] = zero
            for n in range(begin, end):
                for c in range(across):
                    mean[c] += columns[head, n, c]
            for c in range(across):
                mean[c] /= size
                low[head, g, c] += half * (one - shrink) * most * step[head, g, c] - mean[c]
                step[head, g, c] *= shrink
            for n in range(begin, end):
                for c in range(across):
                    x = columns[head, n, c] - mean[c]
                    power[c] += x * x
            for turn in range(ROUNDS):
                total[:] = zero
                square[:] = zero
                cross[:] = zero
                for c in range(across):
                    width = step[head, g, c]
                    inverse[c] = one / width if width > zero else zero
                for n in range(begin, end):
                    for c in range(across):
                        x = columns[head, n, c] - mean[c]
                        y = (x - low[head, g, c]) * inverse[c] + half
                        y = y if y > zero else zero
                        symbol = np.float32(np.int32(y if y < most else most))
                        total[c] += symbol
                        square[c] += symbol * symbol
                        cross[c] += symbol * x
                for c in range(across):
                    spread = square[c] - total[c] * total[c] / size
                    above, below = cross[c], spread
                    if turn == ROUNDS - 1:
                        above, below = power[c], cross[c]
                    if cross[c] > zero and spread > zero:
                        step[head, g, c] = above / below
                        low[head, g, c] = -step[head, g, c] * total[c] / size
            for c in range(across):
                low[head, g, c] += mean[c]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def nearest_symbols(
    columns: Floats, group: int, top: int, low: Floats, step: Floats, out: Bytes
) -> None:
    """The nearest symbol of every number, halves upwards."""
    heads, count, across = columns.shape
    inverse = np.empty(across, np.float32)
    half, zero, one, most = np.float32(0.5), np.float32(0), np.float32(1), np.float32(top)
    for head in range(heads):
        for g in range(low.shape[1]):
            for c in range(across):
                width = step[head, g, c]
                inverse[c] = one / width if width > zero else zero
            for n in range(g * group, min((g + 1) * group, count)):
                for c in range(across):
                    y = (columns[head, n, c] - low[head, g, c]) * inverse[c] + half
                    y = y if y > zero else zero
                    out[head, n, c] = np.uint8(np.int32(y if y < most else most))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def decode_keys(
    packed: Bytes,
    bits: int,
    group: int,
    low: Floats,
    step: Floats,
    exact: int,
    limit: float,
    out: Floats,
) -> None:
    """Numbers of ``out`` (H, T, D) from token ``exact`` on."""
    heads, tokens, dim = out.shape
    per_byte, mask = 8 // bits, np.int32((1 << bits) - 1)
    count = -(-dim // per_byte)
    for head in range(heads):
        for n in range(tokens - exact):
            for part in range(per_byte):
                # Slices, so that the compiler sees indices from 0 and makes vector instructions.
                begin, end, shift = (
                    part * count,
                    min(part * count + count, dim),
                    np.int32(part * bits),
                )
                symbols = packed[head, n]
                lows, steps = low[head, n // group, begin:end], step[head, n // group, begin:end]
                row = out[head, exact + n, begin:end]
                for i in range(len(row)):
                    symbol = (np.int32(symbols[i]) >> shift) & mask
                    x = lows[i] + np.float32(symbol) * steps[i]
                    x = x if x < limit else limit
                    row[i] = x if x > -limit else -limit


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def decode_rest(
    packed: Bytes,
    bits: int,
    group: int,
    low: Floats,
    step: Floats,
    exact: int,
    limit: float,
    out: Floats,
) -> None:
    """Numbers of ``out`` (H, T, D) from token ``exact`` on."""
    heads, tokens, dim = out.shape
    per_byte, mask = 8 // bits, np.int32((1 << bits) - 1)
    for head in range(heads):
        for n in range(tokens - exact):
            taken = 0
            for g in range(low.shape[1]):
                last = min((g + 1) * group, dim)
                count = -(-(last - g * group) // per_byte)
                lowest, width = low[head, g, n], step[head, g, n]
                symbols = packed[head, n, taken : taken + count]
                for part in range(per_byte):
                    begin, shift = g * group + part * count, np.int32(part * bits)
                    row = out[head, exact + n, begin : min(begin + count, last)]
                    for i in range(len(row)):
                        symbol = (np.int32(symbols[i]) >> shift) & mask
                        x = lowest + np.float32(symbol) * width
                        x = x if x < limit else limit
                        row[i] = x if x > -limit else -limit
                taken += count
