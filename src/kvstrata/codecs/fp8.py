"""Floats of one byte, e4m3fn, scaled by a power of two per key channel and per value token.

A power of two is as good a scale as any for a float, up to its subnormals, and it fits a byte.

A frame::

    state 0 | state 1
    a state: byte e + 128 of every scale | byte of every number, in the order (H, T, D)

There is a scale for every (H, D) of a key and for every (H, T) of a value or a latent; a number is
its e4m3fn times 2**e. `docs/codecs.md` is the page of this format.

Source: e4m3fn is that of OCP's FP8 (arXiv:2209.05433): no infinities, 448 the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numba
import numpy as np

from kvstrata.codecs.base import Payload, corrupt
from kvstrata.codecs.elements import Floats
from kvstrata.codecs.lossy import LossyCodec
from kvstrata.codecs.packing import LARGEST
from kvstrata.errors import Incompatible
from kvstrata.layout import Bytes

VERSION = b"\x01"

BIAS = 128
LOWEST, HIGHEST = -100, 120  # so that both 2**e and 2**-e are plain float32


@dataclass(frozen=True)
class Fp8(LossyCodec):
    """e4m3fn, rounded to the nearest, ties to even."""

    family = "fp8"

    @property
    def name(self) -> str:
        return "fp8"

    def parameters(self) -> bytes:
        return VERSION

    @classmethod
    def from_parameters(cls, parameters: bytes) -> Fp8:
        if parameters != VERSION:
            raise Incompatible(f"fp8 {parameters.hex() or 'of no version'}, not version 1")
        return cls()

    def numbers_bound(self, payload: Payload) -> int:
        states, heads, _, _ = payload.layer_shape
        scales = [heads * payload.layer_shape[2 if by_token else 3] for by_token in axes(states)]
        return payload.layer_elements + sum(scales)

    def encode_numbers(self, numbers: Floats, layer: int, payload: Payload, out: Bytes) -> int:
        end = 0
        for state, by_token in zip(numbers, axes(len(numbers)), strict=True):
            largest = np.abs(state).max(axis=2 if by_token else 1)
            # Below 2**8, so that rounding up stays below 448.
            powers = np.clip(np.frexp(largest)[1] - 8, LOWEST, HIGHEST)
            powers[largest == 0] = 0
            out[end : end + powers.size] = (powers + BIAS).reshape(-1)
            end += powers.size
            inverse = np.ldexp(np.float32(1), -powers).astype(np.float32)
            codes = out[end : end + state.size].reshape(state.shape)
            _encode(state, inverse, by_token, codes)
            end += codes.size
        return end

    def decode_numbers(self, frame: Bytes, layer: int, payload: Payload, out: Floats) -> None:
        if len(frame) != self.numbers_bound(payload):
            raise corrupt(f"{len(frame)} bytes, not {self.numbers_bound(payload)}")
        begin, limit = 0, np.float32(LARGEST[payload.dtype])
        for state, by_token in zip(out, axes(len(out)), strict=True):
            heads, tokens, dim = state.shape
            powers = frame[begin : begin + heads * (tokens if by_token else dim)].astype(np.int32)
            begin += powers.size
            powers -= BIAS
            if powers.min() < LOWEST or powers.max() > HIGHEST:
                raise corrupt("a scale that no encoder writes")
            scales = np.ldexp(np.float32(1), powers).astype(np.float32).reshape(heads, -1)
            codes = frame[begin : begin + state.size].reshape(state.shape)
            begin += codes.size
            if (codes & np.uint8(0x7F)).max() == 0x7F:
                raise corrupt("a NaN, though a layer with one is kept exact")
            _decode(codes, _numbers(), scales, by_token, limit, state)


def axes(states: int) -> tuple[bool, ...]:
    """Of every state, whether its scales are by token; else they are by channel."""
    return (False, True) if states == 2 else (True,) * states


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode(numbers: Floats, inverse: Floats, by_token: bool, out: Bytes) -> None:
    heads, tokens, dim = numbers.shape
    scaled = np.empty(dim, np.float32)
    bits = scaled.view(np.int32)
    for head in range(heads):
        for token in range(tokens):
            row, codes = numbers[head, token], out[head, token]
            if by_token:
                factor = inverse[head, token]
                for i in range(dim):
                    scaled[i] = row[i] * factor
            else:
                factors = inverse[head]
                for i in range(dim):
                    scaled[i] = row[i] * factors[i]
            for i in range(dim):
                sign = (bits[i] >> np.int32(24)) & np.int32(0x80)
                word = bits[i] & np.int32(0x7FFFFFFF)
                # A normal number: 20 bits of the fraction go, 120 = 127 - 7 from the exponent.
                odd = (word >> np.int32(20)) & np.int32(1)
                normal = ((word + np.int32(0x7FFFF) + odd) >> np.int32(20)) - np.int32(120 << 3)
                # A subnormal one counts 2**-9; 1.5 * 2**23 leaves no bits for a fraction.
                size = np.abs(scaled[i]) * np.float32(512)
                small = np.int32((size + np.float32(12582912)) - np.float32(12582912))
                code = normal if word >= np.int32(121 << 23) else small
                codes[i] = np.uint8(sign | code)


@cache
def _numbers() -> Floats:
    """The number of every code; of the two that are NaN, what they would be if they were not."""
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + fractions / 8, exponents - 7)
    numbers = np.where(exponents == 0, np.ldexp(fractions / 8, -6), normal)
    return np.where(codes < 128, numbers, -numbers).astype(np.float32)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _decode(
    codes: Bytes, numbers: Floats, scales: Floats, by_token: bool, limit: float, out: Floats
) -> None:
    heads, tokens, dim = out.shape
    for head in range(heads):
        for token in range(tokens):
            row, symbols = out[head, token], codes[head, token]
            if by_token:
                factor = scales[head, token]
                for i in range(dim):
                    row[i] = numbers[symbols[i]] * factor
            else:
                factors = scales[head]
                for i in range(dim):
                    row[i] = numbers[symbols[i]] * factors[i]
            for i in range(dim):
                x = row[i] if row[i] < limit else limit
                row[i] = x if x > -limit else -limit
