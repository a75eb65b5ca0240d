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
    rows, dim = tuple(was.shape), keys.shape[-1] if keys.ndim > 1 else 0
    if rows != tuple(now.shape) or len(rows) != 2 or rows[1] % 2 or rows[1] > dim:
        raise UsageError(f"tables of {rows} and {tuple(now.shape)} for heads of {dim}")
    if rows[0] not in (1, keys.shape[-2]):
        raise UsageError(f"tables of {rows[0]} tokens for {keys.shape[-2]}")
    if {str(one.dtype).rpartition(".")[2] for one in (keys, was, now)} != {"float32"}:
        raise UsageError("keys are turned in float32")
    half = rows[1] // 2
    cos_was, sin_was, cos_now, sin_now = was[:, :half], was[:, half:], now[:, :half], now[:, half:]
    # The table's own factor, and what rounding did to its rows, is in the keys already.
    length = cos_was * cos_was + sin_was * sin_was
    cos = (cos_now * cos_was + sin_now * sin_was) / length
    sin = (sin_now * cos_was - cos_now * sin_was) / length
    pairs = (slice(0, rows[1], 2), slice(1, rows[1], 2))
    if not interleaved:
        pairs = (slice(0, half), slice(half, rows[1]))
    first, second = keys[..., pairs[0]], keys[..., pairs[1]]
    turned = first * cos - second * sin, second * cos + first * sin
    keys[..., pairs[0]], keys[..., pairs[1]] = turned
