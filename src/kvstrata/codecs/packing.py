"""Symbols of 1, 2, 4 or 8 bits in bytes, and the power of two that brings numbers near 1.

Within a block of W symbols, Q = ceil(W / symbols of a byte) bytes: byte i holds symbol i in its
lowest bits, symbol Q + i above it, and so on. So the loops over a block read and write neighbours
and the compiler turns them into vector instructions; pairs of neighbours in one byte would not.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

from kvstrata.codecs.elements import Floats
from kvstrata.layout import Bytes

_LOWEST, _HIGHEST = -100, 120

MAX_BIASED = _HIGHEST - _LOWEST
"""The largest byte that `exponent` writes for its power of two."""

LARGEST = {
    "bfloat16": float.fromhex("0x1.fep127"),
    "float16": 65504.0,
    "float32": float.fromhex("0x1.fffffep127"),
}
"""The largest finite number of a dtype: a decoder stays within it, or rounding makes infinities."""


def row_bytes(width: int, block: int, bits: int) -> int:
    """Bytes of ``width`` symbols of ``bits`` bits in blocks of ``block``, the last one shorter."""
    per_byte = 8 // bits
    return width // block * -(-block // per_byte) + -(-(width % block) // per_byte)


def exponent(numbers: Floats, binade: int) -> int:
    """Biased e, 0 to `MAX_BIASED`, such that ``max |numbers| * 2**-e`` is below ``2**binade``.

    It is at least half of that, unless all of them are below 2**-80 or so. With scales in float16
    of numbers so prepared nothing overflows, whatever a float32 holds.
    """
    largest = max(float(numbers.max()), -float(numbers.min())) if numbers.size else 0.0
    return exponent_of(largest, binade)


def exponent_of(largest: float, binade: int) -> int:
    """`exponent`, where the largest magnitude is known."""
    power = math.frexp(largest)[1] - binade if largest else 0
    return min(max(power, _LOWEST), _HIGHEST) - _LOWEST


def power_of_two(biased: int) -> float:
    """2**e for what `exponent` returned; its inverse is exact too, both in float32."""
    return math.ldexp(1.0, biased + _LOWEST)


def unscaled(scaled: npt.NDArray[np.float16], biased: int) -> Floats:
    """Finite numbers times 2**e; what is more than float32 holds becomes its largest number."""
    limit = np.float32(LARGEST["float32"])
    with np.errstate(over="ignore"):
        numbers: Floats = scaled.astype(np.float32) * np.float32(power_of_two(biased))
    np.clip(numbers, -limit, limit, out=numbers)
    return numbers


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def pack(symbols: Bytes, block: int, bits: int, lowest: int, out: Bytes) -> None:
    """Pack rows: of ``symbols`` (N, W), ``bits`` from ``lowest`` up into ``out`` (N, `row_bytes`).

    A symbol of another width is packed in planes, each of its bits in one of them.
    """
    rows, width = symbols.shape
    per_byte, mask, down = 8 // bits, np.int32((1 << bits) - 1), np.int32(lowest)
    for row in range(rows):
        end = 0
        for begin in range(0, width, block):
            last = min(begin + block, width)
            count = -(-(last - begin) // per_byte)
            packed = out[row, end : end + count]
            packed[:] = 0
            for part in range(per_byte):
                shift = np.int32(part * bits)
                start = begin + part * count
                others = symbols[row, start : min(start + count, last)]
                for i in range(len(others)):
                    symbol = (np.int32(others[i]) >> down) & mask
                    packed[i] = np.uint8(np.int32(packed[i]) | (symbol << shift))
            end += count


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def unpack(packed: Bytes, block: int, bits: int, lowest: int, out: Bytes) -> None:
    """Undo `pack`: ``packed`` (N, `row_bytes`) into ``out`` (N, W), onto the bits below."""
    rows, width = out.shape
    per_byte, mask, up = 8 // bits, np.int32((1 << bits) - 1), np.int32(lowest)
    below = np.int32((1 << lowest) - 1)
    for row in range(rows):
        end = 0
        for begin in range(0, width, block):
            last = min(begin + block, width)
            count = -(-(last - begin) // per_byte)
            bytes_ = packed[row, end : end + count]
            for part in range(per_byte):
                shift = np.int32(part * bits)
                start = begin + part * count
                symbols = out[row, start : min(start + count, last)]
                for i in range(len(symbols)):
                    symbol = (np.int32(bytes_[i]) >> shift) & mask
                    symbols[i] = np.uint8((symbol << up) | (np.int32(symbols[i]) & below))
            end += count
