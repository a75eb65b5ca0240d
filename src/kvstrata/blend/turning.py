"""Keys moved to another position, by the engine's own table of cosines and sines.

Rotary embedding turns pairs of a key's numbers by angles that grow with its position. Turning a key
back by the angles of the position that it was computed for and on by those of its new one gives
what the engine would have written there. Values have no position.

The table is the engine's, so whatever scales its angles (linear, NTK, YaRN, by parts) is in it;
where it scales lengths too, as YaRN's does, the stored key has that factor already and keeps it.

Source: RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstrata.errors import UsageError


def turn(keys: Any, was: Any, now: Any, *, interleaved: bool = False) -> None:
    """Turn keys in place.

    Works on numpy's arrays and on all that are sliced and multiplied like them (torch's tensors, on
    any device).

    Args:
        keys: (..., T, D) float32; changed.
        was: (T, R) float32, of the positions that the keys were computed for, the table's rows: R/2
            cosines, R/2 sines. R is at most D; the numbers behind the first R of a key do not turn.
        now: (T, R) float32, the same of their new positions.
        interleaved: whether numbers 2i and 2i + 1 are a pair (GPT-J's order); else i and i + R/2
            (NeoX's).
    Raises:
        UsageError: shapes or dtypes are not these; nothing was changed.
    """
    cos, sin = between(was, now)
    rotate(keys, cos, sin, interleaved=interleaved)


def between(was: Any, now: Any) -> tuple[Any, Any]:
    """Cosines and sines of the angles from one position to another: each (T, R/2) float32.

    Args:
        was, now: as of `turn`.
    Raises:
        UsageError: shapes or dtypes are not these.
    """
    if tuple(was.shape) != tuple(now.shape) or len(was.shape) != 2 or was.shape[1] % 2:
        raise UsageError(f"tables of {tuple(was.shape)} and {tuple(now.shape)}")
    if not (_is_float32(was) and _is_float32(now)):
        raise UsageError("keys are turned in float32")
    half = was.shape[1] // 2
    cos_was, sin_was, cos_now, sin_now = was[:, :half], was[:, half:], now[:, :half], now[:, half:]
    # The table's own factor, and what rounding did to its rows, is in the keys already.
    length = cos_was * cos_was + sin_was * sin_was
    cos = (cos_now * cos_was + sin_now * sin_was) / length
    sin = (sin_now * cos_was - cos_now * sin_was) / length
    return cos, sin


def rotate(keys: Any, cos: Any, sin: Any, *, interleaved: bool = False) -> None:
    """Turn keys by angles, in place.

    Args:
        keys: (..., T, D) float32; changed.
        cos, sin: (T, R/2) float32, of `between`.
        interleaved: as of `turn`.
    Raises:
        UsageError: shapes or dtypes are not these; nothing was changed.
    """
    dim, (rows, half) = keys.shape[-1] if keys.ndim > 1 else 0, cos.shape
    if 2 * half > dim:
        raise UsageError(f"tables of {2 * half} for heads of {dim}")
    if rows not in (1, keys.shape[-2]):
        raise UsageError(f"tables of {rows} tokens for {keys.shape[-2]}")
    if not _is_float32(keys):
        raise UsageError("keys are turned in float32")
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    if not interleaved:
        pairs = (slice(0, half), slice(half, 2 * half))
    first, second = keys[..., pairs[0]], keys[..., pairs[1]]
    from_second, from_first = second * sin, first * sin
    first *= cos
    first -= from_second
    second *= cos
    second += from_first


def _is_float32(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return bool(array.dtype == np.float32)
    return str(array.dtype).rpartition(".")[2] == "float32"
