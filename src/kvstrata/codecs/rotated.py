"""Rotation, then a fixed codebook: what a rotation mixes is Gaussian, so its levels need no search.

Signs and a Walsh-Hadamard transform spread each head's large channels over all of them. A rotated
number is ``scale * level[symbol]``, the levels those of Lloyd and Max for the normal distribution.
There is one scale a token; of keys, whose channels have means, the mean of every rotated channel
over at most 128 tokens is taken off first. A scale is such that the decoded numbers keep their
projection on the exact ones: the least squares scale makes all of them smaller, which attention,
an average over many tokens, does not forgive as it does errors of either sign.

A frame::

    exact tokens [S, H, n, D] as they were | state 0: groups of 128 tokens | state 1: the same
    a group: byte e + 100 | means (H, D), of keys only | scales (H, tokens)
             | symbols, packed as `packing` says

Means and scales are float16, times 2**e. Symbols are rows of the group's tokens in the order
(H, D), one block a row; of 3 and 5 bits, all but the highest first, then all the highest ones.
`docs/codecs.md` is the page of this format.

Source: TurboQuant, arXiv:2504.19874, with the Hadamard transform of QuaRot, arXiv:2404.00456;
differs: means of key channels; no second code of the residual; sinks exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
    unpack,
)
from kvstrata.codecs.rotation import levels_of, quantise, restore, rotate, signs
from kvstrata.codecs.sinks import SINKS, exact_bytes, load_exact, num_exact, store_exact
from kvstrata.errors import Incompatible, LayoutMismatch, UsageError
from kvstrata.layout import Bytes

VERSION = 1

_GROUP = 128
BINADE = 6  # of the numbers before rotation: float16 then holds every mean and scale
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1)}


@dataclass(frozen=True)
class Rotated(LossyCodec):
    """Hadamard rotation and a codebook, of so many bits for keys and for values and latents.

    Args:
        key_bits, value_bits: of a symbol: 2, 3, 4 or 5.
    Raises:
        UsageError: another number.
    """

    key_bits: int
    value_bits: int

    family = "rotated"

    def __post_init__(self) -> None:
        if self.key_bits not in PLANES or self.value_bits not in PLANES:
            raise UsageError(f"{self.key_bits} and {self.value_bits} bits: expected 2 to 5")

    @property
    def name(self) -> str:
        return f"turbo{self.key_bits}{self.value_bits}"

    def parameters(self) -> bytes:
        return bytes([VERSION, self.key_bits, self.value_bits])

    @classmethod
    def from_parameters(cls, parameters: bytes) -> Rotated:
        if len(parameters) != 3 or parameters[0] != VERSION:
            raise Incompatible(f"rotated {parameters.hex()}: this build knows version {VERSION}")
        try:
            return cls(parameters[1], parameters[2])
        except UsageError as error:
            raise Incompatible(f"rotated {parameters.hex()}: {error}") from error

    def check(self, payload: Payload) -> None:
        super().check(payload)
        if payload.shape[4] % 8:
            raise LayoutMismatch(
                f"head_dim {payload.shape[4]}: a rotation takes multiples of 8. "
                "Name another codec for this model"
            )

    def numbers_bound(self, payload: Payload) -> int:
        exact = exact_bytes(num_exact(SINKS, payload), payload)
        return exact + sum(group.nbytes for group in self.groups(payload))

    def encode_numbers(self, numbers: Floats, layer: int, payload: Payload, out: Bytes) -> int:
        end = store_exact(numbers, num_exact(SINKS, payload), payload, out)
        sign = signs(payload.shape[4])
        for group in self.groups(payload):
            values = numbers[group.state]
            biased = exponent(values[:, group.begin : group.begin + group.num_tokens], BINADE)
            rotated = np.empty(group.shape, np.float32)
            rotate(values, group.begin, np.float32(1 / power_of_two(biased)), sign, rotated)
            symbols = np.empty(group.shape, np.uint8)
            halves = quantise(rotated, group.key, levels_of(group.bits), symbols)
            out[end] = biased
            end += 1
            for half in halves:
                out[end : end + half.nbytes] = half.reshape(-1).view(np.uint8)
                end += half.nbytes
            rows = symbols.reshape(-1, group.num_tokens)
            for lowest, bits, packed in group.planes(out, end):
                pack(rows, group.num_tokens, bits, lowest, packed)
                end += packed.size
        return end

    def decode_numbers(self, frame: Bytes, layer: int, payload: Payload, out: Floats) -> None:
        if len(frame) != self.numbers_bound(payload):
            raise corrupt(f"{len(frame)} bytes, not {self.numbers_bound(payload)}")
        end = load_exact(frame, num_exact(SINKS, payload), payload, out)
        sign, limit = signs(payload.shape[4]), np.float32(LARGEST[payload.dtype])
        for group in self.groups(payload):
            halves = frame[end + 1 : end + 1 + 2 * group.num_halves].view(np.float16)
            if frame[end] > MAX_BIASED or not np.isfinite(halves).all():
                raise corrupt(f"state {group.state} has a scale that is not finite")
            scale = np.float32(power_of_two(int(frame[end])))
            end += 1 + halves.nbytes
            heads, _, count = group.shape
            floats = halves.astype(np.float32)
            means, scales = floats[: -heads * count], floats[-heads * count :]
            symbols = np.empty(group.shape, np.uint8)
            rows = symbols.reshape(-1, group.num_tokens)
            for lowest, bits, packed in group.planes(frame, end):
                unpack(packed, group.num_tokens, bits, lowest, rows)
                end += packed.size
            restore(
                symbols,
                means.reshape(heads, -1),
                scales.reshape(heads, count),
                levels_of(group.bits),
                scale,
                sign,
                limit,
                group.begin,
                out[group.state],
            )

    def groups(self, payload: Payload) -> Iterator[Group]:
        """What is coded together, in the order of the frame."""
        states, heads, tokens, dim = payload.layer_shape
        for state in range(states):
            key = state == 0 and states == 2
            for begin in range(num_exact(SINKS, payload), tokens, _GROUP):
                shape = (heads, dim, min(_GROUP, tokens - begin))
                yield Group(state, begin, key, self.key_bits if key else self.value_bits, shape)


_LEVELS = ((5, 5), (5, 4), (4, 4), (4, 3), (4, 2), (3, 2), (2, 2))
TURBO = tuple(Rotated(*bits) for bits in _LEVELS)
"""`turbo55` to `turbo22`: keys first. Errors of keys cost more, so they have the more bits."""


class Group(NamedTuple):
    """Tokens of a state that are coded together."""

    state: int
    begin: int
    key: bool
    bits: int
    shape: tuple[int, int, int]
    """(H, D, tokens): the order of a rotated tile."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the group."""
        return self.shape[2]

    @property
    def num_halves(self) -> int:
        """Means and scales."""
        heads, dim, count = self.shape
        return heads * (count + dim * self.key)

    @property
    def nbytes(self) -> int:
        rows = self.shape[0] * self.shape[1]
        planes = [
            rows * row_bytes(self.num_tokens, self.num_tokens, bits) for bits in PLANES[self.bits]
        ]
        return 1 + 2 * self.num_halves + sum(planes)

    def planes(self, frame: Bytes, begin: int) -> Iterator[tuple[int, int, Bytes]]:
        """Of every plane of bits: its lowest bit, its width, and its rows in the frame."""
        rows, lowest = self.shape[0] * self.shape[1], 0
        for bits in PLANES[self.bits]:
            width = row_bytes(self.num_tokens, self.num_tokens, bits)
            yield lowest, bits, frame[begin : begin + rows * width].reshape(rows, width)
            begin += rows * width
            lowest += bits
