"""Integers of 8, 4 or 2 bits: keys per channel, values per token, in groups with their own range.

Keys have channels that are large in every token, values have none: so a key's range spans tokens
of one channel, a value's (or a latent's) channels of one token. The prompt's first tokens, the
attention sinks, stay exact. A number is ``low + symbol * step``.

A frame::

    exact tokens [S, H, n, D] as they were | state 0 | state 1
    a state: byte e + 100 | low, float16 | step, float16 | symbols, packed as `packing` says

low and step are (H, groups, D) for keys and (H, groups, T - n) for the rest, times 2**e; symbols
are rows of D in the order (H, T - n), in blocks of D for keys and of a group for the rest.
`docs/codecs.md` is the page of this format.

Source: KIVI, arXiv:2402.02750; differs: no window of recent tokens, as a stored chunk cannot know
that it is the last; ranges fitted to the numbers where ``fit`` says so; sinks exact, as in KVSink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.base import Payload, corrupt
from kvstrata.codecs.elements import Floats
from kvstrata.codecs.lossy import LossyCodec
from kvstrata.codecs.packing import (
    LARGEST,
    MAX_BIASED,
    exponent,
    pack,
    power_of_two,
    row_bytes,
    unscaled,
)
from kvstrata.codecs.ranges import decode_keys, decode_rest, fit_ranges, min_max, nearest_symbols
from kvstrata.codecs.sinks import SINKS, exact_bytes, load_exact, num_exact, store_exact
from kvstrata.errors import Incompatible, UsageError
from kvstrata.layout import Bytes

VERSION = 1

BINADE = 13  # of the numbers that are ranged: float16 holds them and their differences
FIRST = {2: 0.75, 4: 0.95, 8: 1.0}  # of the whole range: where fitting begins

Halves: TypeAlias = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Quantized(LossyCodec):
    """Uniform quantisation.

    Args:
        bits: of a symbol: 2, 4 or 8.
        key_group: tokens of a channel that share a range.
        value_group: channels of a token that share a range.
        sinks: tokens at the beginning of the prompt that stay exact.
        fit: whether a range is fitted to the numbers, so that far ones are clipped; else it goes
            from the smallest to the largest, as in plain KIVI.
    Raises:
        UsageError: a number out of its limits.
    """

    bits: int
    key_group: int
    value_group: int
    sinks: int
    fit: bool

    family = "quantized"

    def __post_init__(self) -> None:
        if self.bits not in FIRST:
            raise UsageError(f"{self.bits} bits: expected 2, 4 or 8")
        if not (0 < self.key_group < 1 << 16 and 0 < self.value_group < 1 << 16):
            raise UsageError("a group has 1 to 65,535 members")
        if not 0 <= self.sinks < 256:
            raise UsageError(f"{self.sinks} exact tokens: expected 0 to 255")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def parameters(self) -> bytes:
        return (
            bytes([VERSION, self.bits, self.sinks, self.fit])
            + self.key_group.to_bytes(2, "little")
            + self.value_group.to_bytes(2, "little")
        )

    @classmethod
    def from_parameters(cls, parameters: bytes) -> Quantized:
        if len(parameters) != 8 or parameters[0] != VERSION or parameters[3] > 1:
            raise Incompatible(f"quantized {parameters.hex()}: this build knows version {VERSION}")
        key_group = int.from_bytes(parameters[4:6], "little")
        value_group = int.from_bytes(parameters[6:8], "little")
        try:
            return cls(parameters[1], key_group, value_group, parameters[2], bool(parameters[3]))
        except UsageError as error:
            raise Incompatible(f"quantized {parameters.hex()}: {error}") from error

    def num_exact(self, payload: Payload) -> int:
        """Tokens of the chunk that stay exact."""
        return num_exact(self.sinks, payload)

    def numbers_bound(self, payload: Payload) -> int:
        exact = exact_bytes(self.num_exact(payload), payload)
        return exact + sum(part.nbytes for part in self.parts(payload))

    def encode_numbers(self, numbers: Floats, layer: int, payload: Payload, out: Bytes) -> int:
        exact = self.num_exact(payload)
        end = store_exact(numbers, exact, payload, out)
        for state, part in enumerate(self.parts(payload)):
            rest = numbers[state, :, exact:]
            biased = exponent(rest, BINADE)
            scaled = rest * np.float32(1 / power_of_two(biased))
            ranges, symbols = self._quantise(scaled if part.key else _transposed(scaled), part)
            rows = symbols if part.key else _transposed(symbols)
            out[end] = biased
            end += 1
            out[end : end + ranges.nbytes] = ranges.reshape(-1).view(np.uint8)
            end += ranges.nbytes
            packed = out[end : end + math.prod(part.packed)].reshape(-1, part.packed[-1])
            pack(rows.reshape(-1, rows.shape[-1]), part.block, self.bits, 0, packed)
            end += packed.size
        return end

    def decode_numbers(self, frame: Bytes, layer: int, payload: Payload, out: Floats) -> None:
        if len(frame) != self.numbers_bound(payload):
            raise corrupt(f"{len(frame)} bytes, not {self.numbers_bound(payload)}")
        exact = self.num_exact(payload)
        limit = np.float32(LARGEST[payload.dtype])
        begin = load_exact(frame, exact, payload, out)
        for state, part in enumerate(self.parts(payload)):
            half = frame[begin + 1 : begin + 1 + 2 * math.prod(part.ranges)].view(np.float16)
            if frame[begin] > MAX_BIASED or not np.isfinite(half).all():
                raise corrupt(f"state {state} has a range that is not finite")
            low, step = unscaled(half, int(frame[begin])).reshape(part.ranges)
            begin += 1 + half.nbytes
            packed = frame[begin : begin + math.prod(part.packed)].reshape(part.packed)
            begin += packed.size
            decode = decode_keys if part.key else decode_rest
            decode(packed, self.bits, part.group, low, step, exact, limit, out[state])

    def _quantise(self, columns: Floats, part: Part) -> tuple[Halves, Bytes]:
        """Ranges (2, H, groups, C) and symbols (H, N, C) of ``columns`` (H, N, C)."""
        top = 2**self.bits - 1
        low, step = np.empty(part.ranges, np.float32)
        min_max(columns, part.group, top, low, step)
        if self.fit:
            fit_ranges(columns, part.group, top, FIRST[self.bits], low, step)
        ranges = np.stack([low, step]).astype(np.float16)
        low, step = ranges.astype(np.float32)
        symbols = np.empty(columns.shape, np.uint8)
        nearest_symbols(columns, part.group, top, low, step, symbols)
        return ranges, symbols

    def parts(self, payload: Payload) -> list[Part]:
        """How each state is coded."""
        states, heads, tokens, dim = payload.layer_shape
        rest = tokens - self.num_exact(payload)
        parts = []
        for state in range(states):
            key = state == 0 and states == 2
            group, block = (self.key_group, dim) if key else (self.value_group,) * 2
            groups, across = (-(-rest // group), dim) if key else (-(-dim // group), rest)
            row = row_bytes(dim, block, self.bits)
            parts.append(Part(key, group, block, (2, heads, groups, across), (heads, rest, row)))
        return parts


INTEGERS = (
    Quantized(bits=8, key_group=128, value_group=64, sinks=SINKS, fit=False),
    Quantized(bits=4, key_group=64, value_group=64, sinks=SINKS, fit=False),
    Quantized(bits=2, key_group=32, value_group=64, sinks=SINKS, fit=True),
)
"""`int8`, `int4`, `int2`. Groups as KL divergence on real KV chose them; fitting pays at 2 bits."""


class Part(NamedTuple):
    """How a state is coded: members of a range, symbols of a packed block, shapes in the frame."""

    key: bool
    group: int
    block: int
    ranges: tuple[int, int, int, int]
    packed: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        return 1 + 2 * math.prod(self.ranges) + math.prod(self.packed)


def _transposed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array.transpose(0, 2, 1))
