"""`fp8` on a GPU: the bytes and the numbers of the CPU.

A program has some tokens or some channels of one head, those that a scale is for, and walks along
the rest of the head in tiles. The work on a number is that of `fp8`, bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvstrata.codecs.base import Payload, corrupt
from kvstrata.codecs.fp8 import BIAS, HIGHEST, LOWEST, Fp8, axes
from kvstrata.codecs.packing import LARGEST

_TILE = 32


def encode_numbers(codec: Fp8, numbers: torch.Tensor, payload: Payload) -> torch.Tensor:
    """What ``codec.encode_numbers`` writes of the finite ``numbers``, float32 (S, H, T, D)."""
    frame = torch.empty(codec.numbers_bound(payload), dtype=torch.uint8, device=numbers.device)
    begin = 0
    for state, by_token in zip(numbers, axes(len(numbers)), strict=True):
        heads, tokens, dim = state.shape
        lines = tokens if by_token else dim
        powers = frame[begin : begin + heads * lines]
        codes = frame[begin + powers.numel() : begin + powers.numel() + state.numel()]
        begin += powers.numel() + codes.numel()
        _encode[(heads, triton.cdiv(lines, _TILE))](
            state.contiguous(),
            powers,
            codes,
            tokens,
            dim,
            by_token,
            LOWEST,
            HIGHEST,
            BIAS,
            _TILE,
            enable_fp_fusion=False,
        )
    return frame


def decode_numbers(codec: Fp8, frame: torch.Tensor, payload: Payload, out: torch.Tensor) -> None:
    """What ``codec.decode_numbers`` does; its errors too. ``out``: float32 (S, H, T, D)."""
    if frame.numel() != codec.numbers_bound(payload):
        raise corrupt(f"{frame.numel()} bytes, not {codec.numbers_bound(payload)}")
    begin = 0
    for state, by_token in zip(out, axes(len(out)), strict=True):
        heads, tokens, dim = state.shape
        lines = tokens if by_token else dim
        powers = frame[begin : begin + heads * lines]
        codes = frame[begin + powers.numel() : begin + powers.numel() + state.numel()]
        begin += powers.numel() + codes.numel()
        if bool(((powers < LOWEST + BIAS) | (powers > HIGHEST + BIAS)).any()):
            raise corrupt("a scale that no encoder writes")
        if bool(((codes & 0x7F) == 0x7F).any()):
            raise corrupt("a NaN, though a layer with one is kept exact")
        _decode[(heads, triton.cdiv(tokens, _TILE), triton.cdiv(dim, _TILE))](
            powers,
            codes,
            state,
            tokens,
            dim,
            LARGEST[payload.dtype],
            by_token,
            BIAS,
            _TILE,
            enable_fp_fusion=False,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _encode(  # type: ignore[no-untyped-def]
    numbers,
    powers,
    codes,
    tokens,
    dim,
    by_token: tl.constexpr,
    lowest: tl.constexpr,
    highest: tl.constexpr,
    bias: tl.constexpr,
    tile: tl.constexpr,
):
    head, line = tl.program_id(0).to(tl.int64), tl.program_id(1) * tile
    down, across = tl.arange(0, tile)[:, None], tl.arange(0, tile)[None, :]
    base = head * tokens * dim
    end = dim if by_token else tokens
    # Of numbers without a sign, bits are in the order of the numbers.
    largest = tl.zeros([tile, 1] if by_token else [1, tile], tl.int32)
    for begin in range(0, end, tile):
        token = down + (line if by_token else begin)
        channel = across + (begin if by_token else line)
        here = (token < tokens) & (channel < dim)
        x = tl.load(numbers + base + token * dim + channel, mask=here, other=0.0)
        word = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(word, 1 if by_token else 0, keep_dims=True))
    # Below 2**8, so that rounding up stays below 448. 126: 0.5 is 2**-1, and the mantissa of frexp.
    power = tl.minimum(tl.maximum((largest >> 23) - 126 - 8, lowest), highest)
    power = tl.where(largest == 0, 0, power)
    place = line + (down if by_token else across)
    lines = tokens if by_token else dim
    tl.store(powers + head * lines + place, (power + bias).to(tl.uint8), mask=place < lines)
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)
    for begin in range(0, end, tile):
        token = down + (line if by_token else begin)
        channel = across + (begin if by_token else line)
        here = (token < tokens) & (channel < dim)
        x = tl.load(numbers + base + token * dim + channel, mask=here, other=0.0) * inverse
        bits = x.to(tl.int32, bitcast=True)
        sign, word = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
        normal = ((word + 0x7FFFF + ((word >> 20) & 1)) >> 20) - (120 << 3)
        small = ((tl.abs(x) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
        code = sign | tl.where(word >= (121 << 23), normal, small)
        tl.store(codes + base + token * dim + channel, code.to(tl.uint8), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    powers,
    codes,
    out,
    tokens,
    dim,
    limit,
    by_token: tl.constexpr,
    bias: tl.constexpr,
    tile: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * tile + tl.arange(0, tile)[:, None]
    channel = tl.program_id(2) * tile + tl.arange(0, tile)[None, :]
    here = (token < tokens) & (channel < dim)
    lines = tokens if by_token else dim
    place = token if by_token else channel
    power = tl.load(powers + head * lines + place, mask=place < lines, other=bias)
    scale = ((power.to(tl.int32) - bias + 127) << 23).to(tl.float32, bitcast=True)
    base = head * tokens * dim + token * dim + channel
    code = tl.load(codes + base, mask=here, other=0).to(tl.int32)
    normal = (((code & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    subnormal = (code & 7).to(tl.float32) * 0.001953125
    x = tl.where((code & 0x78) == 0, subnormal, normal)
    # By its bit: not every release negates a zero.
    x = (x.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True) * scale
    x = tl.where(x < limit, x, limit)
    tl.store(out + base, tl.where(x > -limit, x, -limit), mask=here)
