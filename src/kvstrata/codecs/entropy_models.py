"""The distributions of the entropy coder: part of its format, the same on every machine.

Class 0 is a row of zeros. The last class is for rows that no distribution fits. Between them the
widths grow by the cube root of 2; bins are those of a density ``exp(-|x / scale| ** 1.75)``,
between Laplace and Gauss, which fits real KV best: with means removed, as deltas of tokens, as
principal components, keys and values, quantised to 2 to 5 bits.
"""

from __future__ import annotations

from decimal import Context, Decimal, localcontext
from functools import cache
from typing import NamedTuple, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from kvstrata.layout import Bytes

Symbols: TypeAlias = npt.NDArray[np.int16]

NUM_CLASSES = 29
PLAIN = NUM_CLASSES - 1
"""The class whose symbols are stored as they are."""
PROB_BITS = 12

_TOTAL = 1 << PROB_BITS
_ESCAPE_FREQUENCY = 2
_UNITS = 256  # costs are in 1 / 256 bit
_STRIP = 32


class Tables(NamedTuple):
    """What the loops look up, for each class."""

    decode: npt.NDArray[np.uint32]
    """(class, slot): symbol + 128, or 0 for the escape; frequency << 8; slot in the bin << 20."""
    frequency: npt.NDArray[np.int64]
    """(class, symbol + 128)."""
    start: npt.NDArray[np.int64]
    """(class, symbol + 128): the first slot of the symbol's bin."""
    inverse: npt.NDArray[np.float64]
    """(class, symbol + 128): 1 over the frequency, less 2**-50 of it: see `divisor`."""
    radius: npt.NDArray[np.int16]
    """Of a class: the largest symbol that is not an escape; -1 where all of them are."""
    cost: npt.NDArray[np.uint32]
    """(class, magnitude up to 128): bits times `_UNITS`."""


def _frequencies(class_: int) -> list[int]:
    """Of 0, 1, 2, ...: integers; twice all but the first, and the escape, make 2**PROB_BITS.

    In decimal arithmetic, whose sqrt, exp and ln are rounded correctly: the same everywhere.
    """
    with localcontext(Context(prec=15)):
        scale = (Decimal(2).ln() * (class_ - 1) / 3).exp() / 4
        masses = [_mass(0, scale)]
        while len(masses) < 128 and masses[-1] * 2 * _TOTAL > masses[0]:
            masses.append(_mass(len(masses), scale))
        share = (_TOTAL - _ESCAPE_FREQUENCY) / (masses[0] + 2 * sum(masses[1:]))
        found, tail, above = [0] * len(masses), Decimal(0), 0
        for symbol in range(len(masses) - 1, 0, -1):
            tail += masses[symbol] * share
            found[symbol] = max(1, int(tail) - above)  # what rounding takes here comes back below
            above += found[symbol]
    found[0] = _TOTAL - _ESCAPE_FREQUENCY - 2 * above
    return found


def _mass(symbol: int, scale: Decimal) -> Decimal:
    """The density summed over the bin, symbol - 1/2 to symbol + 1/2, at four points."""
    total = Decimal(0)
    for eighths in (-3, -1, 1, 3):
        t = Decimal(abs(8 * symbol + eighths)) / 8 / scale
        total += (-t * t.sqrt() * t.sqrt().sqrt()).exp()
    return total


@cache
def tables() -> Tables:
    """Made once a process, in a tenth of a second."""
    frequency = np.zeros((NUM_CLASSES, 256), np.int64)
    cost = np.zeros((NUM_CLASSES, 129), np.uint32)
    radius = np.zeros(NUM_CLASSES, np.int16)
    radius[PLAIN] = -1
    for class_ in range(1, PLAIN):
        found = _frequencies(class_)
        radius[class_] = len(found) - 1
        frequency[class_, 0] = _ESCAPE_FREQUENCY
        cost[class_] = _bits(_ESCAPE_FREQUENCY) + 16 * _UNITS
        for symbol, one in enumerate(found):
            frequency[class_, [128 - symbol, 128 + symbol]] = one
            cost[class_, symbol] = _bits(one)
    ends = np.cumsum(frequency, axis=1)
    start = ends - frequency
    decode = np.zeros((NUM_CLASSES, _TOTAL), np.uint32)
    for class_ in range(1, PLAIN):
        index = np.repeat(np.arange(256), frequency[class_])
        within = np.arange(_TOTAL) - start[class_][index]
        decode[class_] = index | frequency[class_][index] << 8 | within << 20
    inverse = (1 - 2.0**-50) / np.maximum(frequency, 1)
    return Tables(decode, frequency, start, inverse, radius, cost)


def _bits(frequency: int) -> int:
    """What a symbol of this frequency costs, in 1 / `_UNITS` bit, by integers alone."""
    return PROB_BITS * _UNITS + 1 - int(frequency**_UNITS).bit_length()


def classify(symbols: Symbols) -> Bytes:
    """The class that codes each row in the fewest bits.

    Args:
        symbols: (blocks, n, width), C-contiguous; a row is a column of a block.
    Returns:
        (blocks * width,).
    """
    blocks, _, width = symbols.shape
    classes = np.empty((blocks, width), np.uint8)
    _classify(symbols, tables().cost, classes)
    return classes.reshape(-1)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _classify(symbols: Symbols, cost: npt.NDArray[np.uint32], classes: Bytes) -> None:
    blocks, n, width = symbols.shape
    # As many rows at a time as have their histograms in the fastest cache.
    histograms = np.empty((_STRIP, 129), np.int32)
    sizes = np.empty(_STRIP, np.int32)
    totals, tops = np.empty(_STRIP, np.int64), np.empty(_STRIP, np.int32)
    for block in range(blocks):
        for begin in range(0, width, _STRIP):
            count = min(_STRIP, width - begin)
            histograms[:], totals[:], tops[:] = 0, 0, 0
            for i in range(n):
                row = symbols[block, i, begin : begin + count]
                for j in range(count):
                    sizes[j] = min(abs(np.int32(row[j])), np.int32(128))
                    totals[j] += sizes[j]
                    tops[j] = max(tops[j], sizes[j])
                for j in range(count):
                    histograms[j, np.uint64(sizes[j])] += 1
            for j in range(count):
                classes[block, begin + j] = _best(histograms[j], totals[j], tops[j], n, cost)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _best(
    histogram: npt.NDArray[np.int32], total: int, top: int, n: int, cost: npt.NDArray[np.uint32]
) -> int:
    if top == 0:
        return 0
    # Costs fall and rise again with the class: begin where the mean magnitude points.
    first, mean = 1, n // 8
    while first < PLAIN - 1 and mean < total:
        first, mean = first + 3, 2 * mean
    first = min(first, PLAIN - 1)
    best, least = first, _row_cost(histogram, cost[first], top)
    for step in (-1, 1):
        class_ = first + step
        while 1 <= class_ < PLAIN:
            this = _row_cost(histogram, cost[class_], top)
            if this >= least:
                break
            best, least, class_ = class_, this, class_ + step
    return best if least < 16 * _UNITS * n else PLAIN


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _row_cost(histogram: npt.NDArray[np.int32], cost: npt.NDArray[np.uint32], top: int) -> int:
    total = 0
    for size in range(top + 1):
        total += np.int64(histogram[size]) * np.int64(cost[size])
    return total
