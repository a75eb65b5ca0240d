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
    | uint8 x rows: class of a row, and its quarters << 5 | stream

The stream is one of `kvstrata.codecs.entropy`, of two parts: the means in bins, a row for each
state, and the differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import numba
import numpy as np

from kvstrata.codecs import entropy
from kvstrata.codecs.base import Payload, corrupt
from kvstrata.codecs.elements import Floats
from kvstrata.codecs.entropy import Symbols
from kvstrata.codecs.lossy import LossyCodec
from kvstrata.codecs.packing import LARGEST
from kvstrata.codecs.sinks import SINKS, exact_bytes, load_exact, num_exact, store_exact
from kvstrata.errors import Incompatible
from kvstrata.layout import Bytes

VERSION = 2

BINS = (0.125, 0.25, 0.5, 0.75, 1.125)
"""Of each level, the finest first: bin width over the root mean square deviation of a channel."""

_GROWTH = (0.7, 1.0, 1.2)  # of the bins, in the first, second and last third of the layers
_MAX_BINS = 8000  # a number spans at most as many, so that differences fit 16 bits
_TINY = 1e-30  # a narrower bin has no inverse in float32: zero it is
_WIDEST = 8e37  # wider than this has none either


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
            raise Incompatible(
                f"cachegen {parameters.hex() or 'of no version'}, not version {VERSION}"
            )
        if not 1 <= parameters[1] <= len(BINS):
            raise Incompatible(f"cachegen has no level {parameters[1]}")
        return cls(parameters[1])

    def numbers_bound(self, payload: Payload) -> int:
        states, heads, tokens, dim = payload.layer_shape
        rows = states * heads * dim
        exact = exact_bytes(num_exact(SINKS, payload), payload)
        coded = entropy.bound(states, heads * dim) + entropy.bound(rows, tokens)
        return 5 * states + exact + rows + coded

    def encode_numbers(self, numbers: Floats, layer: int, payload: Payload, out: Bytes) -> int:
        states, heads, tokens, dim = numbers.shape
        first = num_exact(SINKS, payload)
        channels = (states, heads, dim)
        widths = np.zeros(states, np.float32)
        means, quarters = np.zeros(channels, np.int16), np.zeros(channels, np.uint8)
        differences = np.empty((states, heads, tokens - first, dim), np.int16)
        if differences.size:
            bins = BINS[self.level - 1] * _GROWTH[3 * layer // payload.num_layers]
            _quantise(numbers, first, bins, widths, means, quarters, differences)
        symbols = _symbols(means, differences)
        of_means, of_rows = (entropy.classify(part) for part in symbols)
        end = store_exact(numbers, first, payload, out)
        for piece in widths.astype("<f4"), of_means, of_rows | quarters.reshape(-1) << np.uint8(5):
            out[end : end + piece.nbytes] = piece.view(np.uint8)
            end += piece.nbytes
        parts = list(zip(symbols, (of_means, of_rows), strict=True))
        return end + entropy.encode(parts, out[end:])

    def decode_numbers(self, frame: Bytes, layer: int, payload: Payload, out: Floats) -> None:
        states, heads, tokens, dim = out.shape
        first = num_exact(SINKS, payload)
        sizes = (exact_bytes(first, payload), 4 * states, states, states * heads * dim)
        at_widths, at_means, at_rows, begin = accumulate(sizes)
        if len(frame) < begin:
            raise corrupt("shorter than its widths and classes")
        widths = np.frombuffer(frame[at_widths:at_means].tobytes(), "<f4")
        widths = widths.astype(np.float32, copy=False)
        if not all(0 <= width < math.inf for width in widths.tolist()):
            raise corrupt("a bin that has no width")
        packed = frame[at_rows:begin]
        quarters = packed >> np.uint8(5)
        if quarters.max() > 4:
            raise corrupt("more than the whole token before")
        channels = (states, heads, dim)
        means = np.empty(channels, np.int16)
        differences = np.empty((states, heads, tokens - first, dim), np.int16)
        classes = frame[at_means:at_rows].copy(), packed & np.uint8(31)
        parts = list(zip(_symbols(means, differences), classes, strict=True))
        entropy.decode(frame[begin:], parts)
        load_exact(frame, first, payload, out)
        largest = np.float32(LARGEST[payload.dtype])
        _restore(differences, means, quarters.reshape(channels), widths, largest, first, out)


def _symbols(means: Symbols, differences: Symbols) -> tuple[Symbols, Symbols]:
    """Means (S, H, D) and differences (S, H, T, D), as parts of a stream."""
    states, heads, tokens, dim = differences.shape
    return means.reshape(states, -1, 1), differences.reshape(states * heads, tokens, dim)


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
    whole = np.empty((count, dim), np.int16)
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
            _quarters(whole, quarters[s, h])
            for d in range(dim):
                differences[s, h, 0, d] = whole[0, d]
            for t in range(1, count):
                for d in range(dim):
                    guess = np.int32(whole[t - 1, d]) * np.int32(quarters[s, h, d]) + np.int32(2)
                    differences[s, h, t, d] = np.int32(whole[t, d]) - (guess >> np.int32(2))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _quarters(whole: Symbols, out: Bytes) -> None:
    """Of each channel of ``whole`` (T, D): four times its neighbours' correlation, 0 to 4."""
    count, dim = whole.shape
    products, squares = np.zeros(dim, np.int64), np.zeros(dim, np.int64)
    for t in range(1, count):
        before, now = whole[t - 1], whole[t]
        for d in range(dim):
            products[d] += np.int64(np.int32(now[d]) * np.int32(before[d]))
            squares[d] += np.int64(np.int32(before[d]) * np.int32(before[d]))
    for d in range(dim):
        out[d] = 0
        if products[d] > 0:
            out[d] = min(4, (8 * products[d] + squares[d]) // (2 * squares[d]))


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
    states, heads, count, dim = differences.shape
    before, quarter = np.empty(dim, np.int32), np.empty(dim, np.int32)
    mean = np.empty(dim, np.int32)
    for s in range(states):
        width = widths[s]
        for h in range(heads):
            for d in range(dim):
                before[d], quarter[d], mean[d] = 0, quarters[s, h, d], means[s, h, d]
            for t in range(count):
                of_token, numbers = differences[s, h, t], out[s, h, first + t]
                for d in range(dim):
                    guess = (before[d] * quarter[d] + np.int32(2)) >> np.int32(2)
                    before[d] = np.int32(of_token[d] + guess)
                    x = np.float32(np.int32(before[d] + mean[d])) * width
                    numbers[d] = min(max(x, -largest), largest)
