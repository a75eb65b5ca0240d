"""What is left of a context's KV when tokens were selected, and its bytes as an object's payload.

Every layer and head keeps tokens of its own, as many as it likes, so the rows lie one behind the
other: layer after layer, in each the heads in order. ``docs/format.md`` is the contract of the
bytes (*kept*). numpy alone; elements are unsigned integers of their width, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstrata.errors import CorruptObject, UsageError
from kvstrata.layout import ITEM_BYTES, WORDS, Bytes, Elements
from kvstrata.objects import Buffer, checksum

Numbers = npt.NDArray[np.int32]

STATES = 2
"""Keys and values; of a latent nothing is selected."""
MAX_TOKENS = (1 << 31) - 1


@dataclass(frozen=True, eq=False)
class Kept:
    """The tokens that were kept, with their KV.

    R is the number of rows, those of all layers and heads together, D the size of a head. Whatever
    turns keys by their positions has been done to them already, so a row is used where it is.

    Args:
        counts: (L, H) int32, how many tokens each head keeps; none is fine.
        positions: (R,) int32, counted from the prompt's beginning, ascending in each head.
        keys, values: (R, D) unsigned integers of the element's width.
        dtype: of an element, a key of `kvstrata.layout.ITEM_BYTES`.
        prompt_tokens: of the context that they were selected from.
    Raises:
        UsageError: these do not go together; the message says what.
    """

    counts: Numbers
    positions: Numbers
    keys: Elements
    values: Elements
    dtype: str
    prompt_tokens: int

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise UsageError(f"dtype {self.dtype!r}: expected one of {', '.join(ITEM_BYTES)}")
        word = np.dtype(WORDS[ITEM_BYTES[self.dtype]])
        for name, array, ndim, dtype in (
            ("counts", self.counts, 2, np.dtype(np.int32)),
            ("positions", self.positions, 1, np.dtype(np.int32)),
            ("keys", self.keys, 2, word),
            ("values", self.values, 2, word),
        ):
            if array.ndim != ndim or array.dtype != dtype:
                raise UsageError(
                    f"kept: {name} is {array.dtype} {array.shape}, not {dtype} of {ndim} dimensions"
                )
        if self.keys.shape != self.values.shape or len(self.keys) != len(self.positions):
            raise UsageError(
                f"kept: {len(self.positions)} positions, keys {self.keys.shape}, values "
                f"{self.values.shape}"
            )
        if not self.keys.size or not self.counts.size:
            raise UsageError("kept: no tokens at all")
        problem = problem_of(self.counts, self.positions, len(self.positions), self.prompt_tokens)
        if problem:
            raise UsageError(f"kept: {problem}")

    @property
    def rows(self) -> int:
        """R."""
        return len(self.positions)

    @property
    def ends(self) -> Numbers:
        """(L, H) int32: behind which row a head's rows end."""
        return ends_of(self.counts)

    def head(self, layer: int, head: int) -> slice:
        """Where the rows of one head are, in ``positions``, ``keys`` and ``values``."""
        end = int(self.ends[layer, head])
        return slice(end - int(self.counts[layer, head]), end)

    def shape(self, rows: int = 0) -> tuple[int, int, int, int, int]:
        """Of its payload, (L, S, H, R, D), with padding up to so many rows."""
        layers, heads = self.counts.shape
        return layers, STATES, heads, max(rows, self.rows), int(self.keys.shape[1])

    def equals(self, other: Kept) -> bool:
        """Whether they are the same to the last bit."""
        return (
            (self.dtype, self.prompt_tokens) == (other.dtype, other.prompt_tokens)
            and np.array_equal(self.counts, other.counts)
            and np.array_equal(self.positions, other.positions)
            and np.array_equal(self.keys, other.keys)
            and np.array_equal(self.values, other.values)
        )


def problem_of(counts: Numbers, positions: Numbers, rows: int, prompt_tokens: int) -> str:
    """What is wrong with them, in words; empty: nothing.

    Args:
        counts: (L, H) int32.
        positions: int32, at least one of each row that is used.
        rows: that there are; unless padding is allowed, as many as are used.
        prompt_tokens: of the context.
    """
    if not 0 < prompt_tokens <= MAX_TOKENS:
        return f"a context of {prompt_tokens} tokens, not 1 to {MAX_TOKENS}"
    if int(counts.min()) < 0 or int(counts.max()) > prompt_tokens:
        return f"a head keeps {counts.min()} to {counts.max()} of {prompt_tokens} tokens"
    used = int(counts.sum(dtype=np.int64))
    if used != rows:
        return f"heads keep {used} tokens, but there are {rows} rows"
    if not used:
        return "no head keeps any token"
    if int(positions.min()) < 0 or int(positions.max()) >= prompt_tokens:
        return (
            f"positions {positions.min()} to {positions.max()} of a context of {prompt_tokens} "
            "tokens"
        )
    rising = np.diff(positions) > 0
    # From the last row of a head to the first one of the next they may fall.
    starts = ends_of(counts).ravel()[:-1]
    rising[starts[(starts > 0) & (starts < used)] - 1] = True
    if not rising.all():
        row = int(np.argmin(rising)) + 1
        return f"position {positions[row]} in row {row} follows {positions[row - 1]} in one head"
    return ""


def ends_of(counts: Numbers) -> Numbers:
    """(L, H) int32: behind which row a head's rows end."""
    return np.cumsum(counts, dtype=np.int32).reshape(counts.shape)


def budget_rows(heads: int, tokens: int, fraction: float) -> int:
    """The rows that a fraction of a context is, of all layers and heads together.

    So the size of an object follows from how many tokens it stands for, and whoever looks for one
    knows what to make room for.

    Args:
        heads: L * H.
        tokens: of the context.
        fraction: of all rows, above 0, at most 1.
    """
    return int(fraction * heads * tokens)


def payload_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a payload of this shape, (L, S, H, R, D)."""
    layers, states, heads, rows, dim = shape
    return 4 * (layers * heads + rows) + states * rows * dim * ITEM_BYTES[dtype]


def table_bytes(shape: Sequence[int]) -> int:
    """Bytes of the counts and positions, which a payload begins with."""
    layers, _, heads, rows, _ = shape
    return 4 * (layers * heads + rows)


def encode(kept: Kept, out: Bytes, rows: int = 0) -> None:
    """Write a payload: counts, positions, keys, values.

    Args:
        out: (payload_bytes(kept.shape(rows), kept.dtype),) uint8, C-contiguous, overwritten.
        rows: up to how many it is padded with zeros, so that its size can be known before what it
            holds; fewer than there are: none.
    Raises:
        UsageError: ``out`` has another size.
    """
    shape = kept.shape(rows)
    if out.shape != (payload_bytes(shape, kept.dtype),) or out.dtype != np.uint8:
        raise UsageError(f"{out.dtype} {out.shape} for a kept payload of {shape} {kept.dtype}")
    begin = table_bytes(shape)
    out[:begin] = table(kept, rows)
    states = out[begin:].view(kept.keys.dtype).reshape(STATES, *shape[3:])
    for target, source in zip(states, (kept.keys, kept.values), strict=True):
        target[: kept.rows] = source
        target[kept.rows :] = 0


def table(kept: Kept, rows: int = 0) -> Bytes:
    """What a payload begins with, counts and positions; arguments as of `encode`."""
    numbers = np.zeros(table_bytes(kept.shape(rows)) // 4, np.int32)
    numbers[: kept.counts.size] = kept.counts.ravel()
    numbers[kept.counts.size :][: kept.rows] = kept.positions
    return numbers.view(np.uint8)


def decode(payload: Buffer | Bytes, shape: Sequence[int], dtype: str, prompt_tokens: int) -> Kept:
    """Read a payload, without copying it; every number in it is checked.

    Args:
        payload: contiguous bytes, as `encode` wrote them; they must not change while the result
            is in use.
        shape: (L, S, H, R, D), as in its header.
        dtype: as in its header.
        prompt_tokens: of the context, as the header's boundary says.
    Raises:
        CorruptObject: they are not what `encode` writes; the message says what is wrong.
    """
    flat = np.frombuffer(payload, np.uint8)
    if len(shape) != 5 or min(shape) < 1 or shape[1] != STATES:
        raise CorruptObject(f"a kept payload of shape {tuple(shape)}, not [L, {STATES}, H, R, D]")
    if dtype not in ITEM_BYTES:
        raise CorruptObject(f"a kept payload of unknown dtype {dtype!r}")
    if len(flat) != payload_bytes(shape, dtype):
        raise CorruptObject(
            f"{len(flat)} bytes for a kept payload of {tuple(shape)} {dtype}, not "
            f"{payload_bytes(shape, dtype)}"
        )
    rows, dim = shape[3:]
    end = table_bytes(shape)
    counts, positions = counts_and_positions(flat[:end], shape)
    used = int(counts.sum(dtype=np.int64))
    if not 0 < used <= rows:
        raise CorruptObject(f"kept: heads keep {used} tokens, but there are {rows} rows")
    states = flat[end:].view(WORDS[ITEM_BYTES[dtype]]).reshape(STATES, rows, dim)
    if positions[used:].any() or states[:, used:].any():
        raise CorruptObject("kept: padding behind the last row is not zero")
    keys, values = states[:, :used]
    try:
        return Kept(counts, positions[:used], keys, values, dtype, prompt_tokens)
    except UsageError as error:
        raise CorruptObject(str(error)) from error


def counts_and_positions(table: Bytes, shape: Sequence[int]) -> tuple[Numbers, Numbers]:
    """What a payload begins with: (L, H) and (R,) int32, not checked.

    Args:
        table: (table_bytes(shape),) uint8.
    """
    layers, _, heads, _, _ = shape
    numbers = table.view(np.int32)
    return numbers[: layers * heads].reshape(layers, heads), numbers[layers * heads :]


def positions_digest(payload: Bytes, shape: Sequence[int]) -> bytes:
    """16 bytes: the header's field ``positions``, of a payload, or of its `table` alone."""
    return checksum(np.ascontiguousarray(payload[: table_bytes(shape)]).data)
