"""CacheGen: quantise finer in the first layers, code differences of neighbouring tokens.

Source: CacheGen, arXiv:2310.07240 (SIGCOMM 2024). Kept: layers in three groups whose bins grow,
change-based coding along the tokens, entropy coding with a model per channel and layer, several
levels among which a stream may change from chunk to chunk. Differs, each time because it measured
better on real KV:

- The paper subtracts an anchor token, one in ten, from the nine around it, and stores anchors in 8
  bits. Here a channel's mean over the chunk is taken out, and of the token before as many quarters
  as correlate: 0.8 bits less per element of a key at equal error, 0.7 of a value.
- That happens among whole numbers, after quantising: no error adds up from token to token.
- One bin width for all channels of a layer's keys and one for its values, in proportion to how far
  a channel wanders from its mean. Widths per channel cost more at an equal error of the output.
- Bins grow as 0.7, 1, 1.2 and not as 0.5, 1, 1.5.
- The first four tokens of a prompt, the attention sinks, stay exact.

A frame, little endian; rows are (state, head, channel)::

    words (S, H, exact tokens, D) | float32 x S: bin widths | uint8 x S: classes of the means
    | uint8 x rows: class of a row, and its quarters << 5
    | uint32: length of the means | means (S, H * D) | differences (rows, tokens)

Means, in bins, and differences are streams of `kvstrata.codecs.entropy`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from kvstrata.codecs import entropy
from kvstrata.codecs.base import Payload, corrupt
from kvstrata.codecs.elements import Floats
from kvstrata.codecs.entropy import Symbols
from kvstrata.codecs.lossy import LossyCodec
from kvstrata.codecs.sinks import SINKS, exact_bytes, load_exact, num_exact, store_exact
from kvstrata.errors import Incompatible
from kvstrata.layout import Bytes

VERSION = 1

BINS = (0.125, 0.25, 0.5, 0.75, 1.125)
"""Of each level, the finest first: bin width over the root mean square deviation of a channel."""

_GROWTH = (0.7, 1.0, 1.2)  # of the bins, in the first, second and last third of the layers
_MAX_BINS = 8000  # a number spans at most as many, so that differences fit 16 bits
_TINY = 1e-30  # a narrower bin has no inverse in float32: zero it is
_WIDEST = 8e37  # wider than this has none either
_LARGEST = {"bfloat16": 3.3895314e38, "float16": 65504.0, "float32": 3.4028235e38}


@dataclass(frozen=True)
class CacheGen(LossyCodec):
    """One level, 1 (finest) to 5 (smallest)."""

    level: int

    family = "cachegen"

    @property
    def name(self) -> str:
        return f"cachegen-{self.level}"

    def parameters(self) -> bytes:
        return bytes([VERSION, self.level])

    @classmethod
    def from_parameters(cls, parameters: bytes) -> CacheGen:
        if len(parameters) != 2 or parameters[0] != VERSION:
            raise Incompatible(f"cachegen {parameters.hex() or 'of no version'}, not version 1")
        if not 1 <= parameters[1] <= len(BINS):
            raise Incompatible(f"cachegen has no level {parameters[1]}")
        return cls(parameters[1])

    def numbers_bound(self, payload: Payload) -> int:
        states, heads, tokens, dim = payload.layer_shape
        rows = states * heads * dim
        exact = exact_bytes(num_exact(SINKS, payload), payload)
        coded = entropy.bound(states, heads * dim) + entropy.bound(rows, tokens)
        return 5 * states + exact + rows + 4 + coded

    def encode_numbers(self, numbers: Floats, layer: int, payload: Payload, out: Bytes) -> int:
        states, heads, tokens, dim = numbers.shape
        first = num_exact(SINKS, payload)
        channels = (states, heads, dim)
        widths = np.zeros(states, np.float32)
        means, quarters = np.zeros(channels, np.int16), np.zeros(channels, np.uint8)
        differences = np.empty((*channels, tokens - first), np.int16)
        if differences.size:
            bins = BINS[self.level - 1] * _GROWTH[3 * layer // payload.num_layers]
            _quantise(numbers, first, bins, widths, means, quarters, differences)
        mean_rows = means.reshape(states, heads * dim)
        rows = differences.reshape(means.size, tokens - first)
        of_means, of_rows = entropy.classify(mean_rows), entropy.classify(rows)
        end = store_exact(numbers, first, payload, out)
        for part in widths.astype("<f4"), of_means, of_rows | quarters.reshape(-1) << np.uint8(5):
            out[end : end + part.nbytes] = part.view(np.uint8)
            end += part.nbytes
        size = entropy.encode(mean_rows, of_means, out[end + 4 :])
        out[end : end + 4] = np.array([size], "<u4").view(np.uint8)
        end += 4 + size
        return end + entropy.encode(rows, of_rows, out[end:])

    def decode_numbers(self, frame: Bytes, layer: int, payload: Payload, out: Floats) -> None:
        states, heads, tokens, dim = out.shape
        first = num_exact(SINKS, payload)
        rows = states * heads * dim
        sizes = (exact_bytes(first, payload), 4 * states, states, rows, 4)
        if len(frame) < sum(sizes):
            raise corrupt("shorter than its widths and classes")
        _, raw_widths, of_means, packed, length = np.split(
            frame[: sum(sizes)].copy(), np.cumsum(sizes)[:-1]
        )
        widths = np.frombuffer(raw_widths.tobytes(), "<f4").astype(np.float32, copy=False)
        if not (np.isfinite(widths) & (widths >= 0)).all():
            raise corrupt("a bin that has no width")
        of_rows, quarters = packed & np.uint8(31), packed >> np.uint8(5)
        if (quarters > 4).any():
            raise corrupt("more than the whole token before")
        end = sum(sizes) + int.from_bytes(length.tobytes(), "little")
        if end > len(frame):
            raise corrupt("its means go beyond its end")
        means = np.empty((states, heads * dim), np.int16)
        entropy.decode(frame[sum(sizes) : end], of_means, means)
        differences = np.empty((rows, tokens - first), np.int16)
        entropy.decode(frame[end:], of_rows, differences)
        load_exact(frame, first, payload, out)
        channels, largest = (states, heads, dim), np.float32(_LARGEST[payload.dtype])
        _restore(
            differences.reshape(*channels, tokens - first), means.reshape(channels),
            quarters.reshape(channels), widths, largest, first, out,
        )  # fmt: skip


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _quantise(
    numbers: Floats,
    first: int,
    bins: float,
    widths: Floats,
    means: Symbols,
    quarters: Bytes,
    differences: Symbols,
) -> None:
    """Numbers (S, H, T, D) to whole numbers of bins; sums run in float64, in one order."""
    states, heads, tokens, dim = numbers.shape
    count = tokens - first
    sums, squares = np.empty((heads, dim), np.float64), np.empty(dim, np.float64)
    largest = np.empty(dim, np.float32)
    whole, row = np.empty((count, dim), np.int16), np.empty((dim, count), np.int16)
    for s in range(states):
        spread, level = 0.0, 0.0
        largest[:] = 0
        for h in range(heads):
            sums[h] = 0.0
            squares[:] = 0.0
            for t in range(first, tokens):
                for d in range(dim):
                    x = np.float64(numbers[s, h, t, d])
                    sums[h, d] += x
                    squares[d] += x * x
                for d in range(dim):
                    largest[d] = max(largest[d], abs(numbers[s, h, t, d]))
            for d in range(dim):
                mean = sums[h, d] / count
                level += mean * mean
                spread += max(0.0, squares[d] / count - mean * mean)
        # What hardly moves, or a single token, would have bins of no width but for its level.
        width = bins * np.sqrt((spread + level / 4096) / (heads * dim))
        width = min(max(width, np.float64(largest.max()) / _MAX_BINS), _WIDEST)
        if width < _TINY:
            width = 0.0
        widths[s] = width
        inverse = np.float32(1) / widths[s] if width > 0 else np.float32(0)
        for h in range(heads):
            mean_of = means[s, h]
            for d in range(dim):
                mean_of[d] = np.int16(np.rint(np.float32(sums[h, d] / count) * inverse))
            for t in range(count):
                for d in range(dim):
                    x = np.rint(numbers[s, h, first + t, d] * inverse)
                    whole[t, d] = np.int32(x) - np.int32(mean_of[d])
            _turn(whole, row)
            for d in range(dim):
                quarter = np.int32(_quarters(row[d]))
                quarters[s, h, d] = quarter
                differences[s, h, d, 0] = row[d, 0]
                for t in range(1, count):
                    before = np.int32(row[d, t - 1]) * quarter + np.int32(2)
                    differences[s, h, d, t] = np.int32(row[d, t]) - (before >> np.int32(2))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _quarters(row: Symbols) -> int:
    """Four times the correlation of neighbours, rounded, 0 to 4."""
    product, square = np.int64(0), np.int64(0)
    for t in range(1, len(row)):
        product += np.int64(row[t]) * np.int64(row[t - 1])
        square += np.int64(row[t - 1]) * np.int64(row[t - 1])
    if product <= 0:
        return 0
    return int(min(4, (8 * product + square) // (2 * square)))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _turn(rows: Symbols, out: Symbols) -> None:
    """Transpose, eight rows at a time: what they hold of a cache line is used while it is there."""
    num_rows, num_columns = rows.shape
    for begin in range(0, num_rows, 8):
        if begin + 8 <= num_rows:
            for column in range(num_columns):
                for i in range(8):
                    out[column, begin + i] = rows[begin + i, column]
        else:
            for column in range(num_columns):
                for i in range(begin, num_rows):
                    out[column, i] = rows[i, column]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _restore(
    differences: Symbols,
    means: Symbols,
    quarters: Bytes,
    widths: Floats,
    largest: np.float32,
    first: int,
    out: Floats,
) -> None:
    states, heads, dim, count = differences.shape
    # Turned round first: the loop over channels is the one that vectorises.
    turned = np.empty((count, dim), np.int16)
    before, quarter = np.empty(dim, np.int32), np.empty(dim, np.int32)
    mean = np.empty(dim, np.int32)
    for s in range(states):
        width = widths[s]
        for h in range(heads):
            _turn(differences[s, h], turned)
            for d in range(dim):
                before[d], quarter[d], mean[d] = 0, quarters[s, h, d], means[s, h, d]
            for t in range(count):
                of_token, numbers = turned[t], out[s, h, first + t]
                for d in range(dim):
                    guess = (before[d] * quarter[d] + np.int32(2)) >> np.int32(2)
                    before[d] = np.int32(of_token[d] + guess)
                    x = np.float32(np.int32(before[d] + mean[d])) * width
                    numbers[d] = min(max(x, -largest), largest)
