"""Numbers that tell every element of a cache from every other, in whatever dtype it has.

A self-test writes them by the engine's own means and looks for each in its place. They are written
digit by digit, in integers that the dtype holds exactly, in as many rounds as there are digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy.typing as npt
import torch

from kvstrata.layout import ITEM_BYTES

_EXACT = {
    "float32": 1 << 24,
    "float16": 1 << 11,
    "bfloat16": 1 << 8,
    "float8_e4m3fn": 1 << 4,
    "float8_e5m2": 1 << 3,
}
"""All integers below this are exact in that dtype."""


def rounds(shape: tuple[int, ...], dtype: str) -> Iterator[torch.Tensor]:
    """Digits of a number of its own for each element, the lowest first.

    Args:
        shape: of what is written at once.
        dtype: that it is stored in, a key of `kvstrata.layout.ITEM_BYTES`.
    Returns:
        float32 tensors of that shape; no two elements are equal in all of them.
    """
    numbers = torch.arange(prod(shape)).reshape(shape)
    place = 1
    while place <= numbers.numel():
        yield (numbers // place % _EXACT[dtype]).to(torch.float32)
        place *= _EXACT[dtype]


def words(digits: torch.Tensor, dtype: str) -> npt.NDArray[Any]:
    """The bytes of these numbers in that dtype, as unsigned integers of its width."""
    stored = digits.to(getattr(torch, dtype)).contiguous()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}[ITEM_BYTES[dtype]]
    array: npt.NDArray[Any] = stored.view(signed).numpy()
    return array.view(f"u{ITEM_BYTES[dtype]}")
