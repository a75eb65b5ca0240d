"""Words of a floating-point dtype to float32 and back, in numpy alone: no copy through torch."""

from __future__ import annotations

from typing import TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from kvstrata.layout import Elements

Floats: TypeAlias = npt.NDArray[np.float32]


def to_float32(words: Elements, dtype: str) -> Floats:
    """The numbers, exactly.

    Args:
        words: C-contiguous, any shape.
        dtype: bfloat16, float16 or float32.
    Returns:
        float32 of the same shape; for float32 a view.
    """
    if dtype == "bfloat16":
        wide = np.empty(words.shape, np.uint32)
        _widen(words.reshape(-1), wide.reshape(-1))
        return wide.view(np.float32)
    if dtype == "float16":
        return words.view(np.float16).astype(np.float32)
    return words.view(np.float32)


def from_float32(numbers: Floats, dtype: str, out: Elements) -> None:
    """Round to nearest, ties to even, as torch does; what is too large for the dtype is infinite.

    Args:
        numbers: C-contiguous.
        dtype: bfloat16, float16 or float32.
        out: words of the same shape, C-contiguous.
    """
    if dtype == "bfloat16":
        _narrow(numbers.view(np.uint32).reshape(-1), out.reshape(-1))
    elif dtype == "float16":
        with np.errstate(over="ignore"):
            out.view(np.float16)[...] = numbers
    else:
        out.view(np.float32)[...] = numbers


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _widen(words: Elements, out: Elements) -> None:
    for i in range(len(words)):
        out[i] = np.uint32(words[i]) << np.uint32(16)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _narrow(bits: Elements, out: Elements) -> None:
    for i in range(len(bits)):
        word = bits[i]
        # Casts keep numba at 32 bits: twice as many fit a vector register.
        odd = np.uint32((word >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(word + np.uint32(0x7FFF)) + odd) >> np.uint32(16)
        nan = np.uint32(word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16(0x7FC0) if nan else np.uint16(rounded)
