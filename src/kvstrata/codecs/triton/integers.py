"""`quantized` on a GPU: the bytes and the numbers of the CPU.

To encode, each program has one group of one head and some of its columns, and walks along the group
as the loops of `ranges` do: sums in the same order, no fused multiply-add, divisions rounded
correctly. To decode, each has a tile of tokens and channels, every number alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kvstrata.codecs.base import Payload, corrupt
from kvstrata.codecs.packing import LARGEST, MAX_BIASED, power_of_two
from kvstrata.codecs.quantized import BINADE, FIRST, Quantized
from kvstrata.codecs.ranges import ROUNDS
from kvstrata.codecs.triton.packing import (
    as_bytes,
    exponents,
    inverses,
    largest,
    load_exact,
    of_bytes,
    pack,
    store_exact,
)

_COLUMNS = 64
_TILE = 32


def encode_numbers(codec: Quantized, numbers: torch.Tensor, payload: Payload) -> torch.Tensor:
    """What ``codec.encode_numbers`` writes of the finite ``numbers``, float32 (S, H, T, D)."""
    exact = codec.num_exact(payload)
    pieces = [store_exact(numbers, exact, payload)]
    for state, part in enumerate(codec.parts(payload)):
        rest = numbers[state, :, exact:]
        biased = exponents(largest(rest), BINADE)
        scaled = rest * inverses(biased)
        columns = (scaled if part.key else scaled.transpose(1, 2)).contiguous()
        heads, count, across = columns.shape
        ranges = torch.empty(part.ranges, dtype=torch.float16, device=rest.device)
        symbols = torch.empty(columns.shape, dtype=torch.uint8, device=rest.device)
        if columns.numel():
            _encode[(heads, part.ranges[2], triton.cdiv(across, _COLUMNS))](
                columns,
                ranges[0],
                ranges[1],
                symbols,
                count,
                across,
                part.ranges[2],
                part.group,
                float(2**codec.bits - 1),
                FIRST[codec.bits],
                codec.fit,
                ROUNDS,
                _COLUMNS,
                enable_fp_fusion=False,
            )
        rows = symbols if part.key else symbols.transpose(1, 2)
        pieces += [biased, as_bytes(ranges), as_bytes(pack(rows, part.block, codec.bits, 0))]
    return torch.cat(pieces)


def decode_numbers(
    codec: Quantized, frame: torch.Tensor, payload: Payload, out: torch.Tensor
) -> None:
    """What ``codec.decode_numbers`` does; its errors too. ``out``: float32 (S, H, T, D)."""
    if frame.numel() != codec.numbers_bound(payload):
        raise corrupt(f"{frame.numel()} bytes, not {codec.numbers_bound(payload)}")
    exact = codec.num_exact(payload)
    begin = load_exact(frame, exact, payload, out)
    for state, part in enumerate(codec.parts(payload)):
        biased = int(frame[begin])
        ranges = of_bytes(frame[begin + 1 : begin + 1 + 2 * math.prod(part.ranges)], torch.float16)
        if biased > MAX_BIASED or not bool(ranges.isfinite().all()):
            raise corrupt(f"state {state} has a range that is not finite")
        begin += 1 + 2 * ranges.numel()
        packed = frame[begin : begin + math.prod(part.packed)]
        begin += packed.numel()
        if not packed.numel():
            continue
        heads, tokens, dim = out[state].shape
        low, step = ranges.reshape(2, -1)
        _decode[(heads, triton.cdiv(tokens - exact, _TILE), triton.cdiv(dim, _TILE))](
            packed,
            low,
            step,
            out[state],
            tokens,
            exact,
            dim,
            part.packed[2],
            part.ranges[2],
            part.ranges[3],
            part.group,
            part.block,
            power_of_two(biased),
            LARGEST["float32"],
            LARGEST[payload.dtype],
            part.key,
            codec.bits,
            _TILE,
            enable_fp_fusion=False,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _encode(  # type: ignore[no-untyped-def]
    columns,
    low_out,
    step_out,
    symbols,
    count,
    across,
    groups,
    group,
    most,
    first,
    fit: tl.constexpr,
    rounds: tl.constexpr,
    width: tl.constexpr,
):
    head, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * width + tl.arange(0, width)
    here = c < across
    begin, end = g * group, tl.minimum((g + 1) * group, count)
    base = columns + head * count * across + c
    low = tl.load(base + begin * across, mask=here, other=0.0)
    high = low
    for n in range(begin + 1, end):
        x = tl.load(base + n * across, mask=here, other=0.0)
        # Not minimum and maximum: of two zeros, the first one stays, whatever its sign.
        low, high = tl.where(x < low, x, low), tl.where(x > high, x, high)
    step = tl.div_rn(high - low, tl.zeros_like(low) + most)
    if fit:
        size = tl.zeros_like(low) + (end - begin).to(tl.float32)
        total = tl.zeros_like(low)
        for n in range(begin, end):
            total += tl.load(base + n * across, mask=here, other=0.0)
        mean = tl.div_rn(total, size)
        shrink = tl.zeros_like(low) + first
        low += 0.5 * (1.0 - shrink) * most * step - mean
        step *= shrink
        power = tl.zeros_like(low)
        for n in range(begin, end):
            x = tl.load(base + n * across, mask=here, other=0.0) - mean
            power += x * x
        for turn in tl.static_range(rounds):
            inverse = tl.where(step > 0, tl.div_rn(tl.full([width], 1.0, tl.float32), step), 0.0)
            total, square, cross = tl.zeros_like(low), tl.zeros_like(low), tl.zeros_like(low)
            for n in range(begin, end):
                x = tl.load(base + n * across, mask=here, other=0.0) - mean
                y = tl.minimum(tl.maximum((x - low) * inverse + 0.5, 0.0), most)
                y = y.to(tl.int32).to(tl.float32)
                total += y
                square += y * y
                cross += y * x
            spread = square - tl.div_rn(total * total, size)
            above, below = cross, spread
            if turn == rounds - 1:
                above, below = power, cross
            better = (cross > 0) & (spread > 0)
            step = tl.where(better, tl.div_rn(above, below), step)
            low = tl.where(better, tl.div_rn(-step * total, size), low)
        low += mean
    low16, step16 = low.to(tl.float16), step.to(tl.float16)
    place = (head * groups + g) * across + c
    tl.store(low_out + place, low16, mask=here)
    tl.store(step_out + place, step16, mask=here)
    low, step = low16.to(tl.float32), step16.to(tl.float32)
    inverse = tl.where(step > 0, tl.div_rn(tl.full([width], 1.0, tl.float32), step), 0.0)
    for n in range(begin, end):
        x = tl.load(base + n * across, mask=here, other=0.0)
        y = tl.minimum(tl.maximum((x - low) * inverse + 0.5, 0.0), most)
        symbol = y.to(tl.int32).to(tl.uint8)
        tl.store(symbols + head * count * across + n * across + c, symbol, mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    packed,
    low,
    step,
    out,
    tokens,
    exact,
    dim,
    row_bytes,
    groups,
    lines,
    group,
    block,
    scale,
    most,
    limit,
    key: tl.constexpr,
    bits: tl.constexpr,
    tile: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * tile + tl.arange(0, tile)[:, None]
    d = tl.program_id(2) * tile + tl.arange(0, tile)[None, :]
    here = (n < tokens - exact) & (d < dim)
    # As `packing` says: of a block, byte i holds symbol i in its lowest bits, symbol Q + i above.
    per_byte: tl.constexpr = 8 // bits
    first = d // block * block
    count = (tl.minimum(block, tl.maximum(dim - first, 1)) + per_byte - 1) // per_byte
    part, place = (d - first) // count, (d - first) % count
    before = d // block * ((block + per_byte - 1) // per_byte)
    row = packed + (head * (tokens - exact) + n) * row_bytes
    byte = tl.load(row + before + place, mask=here, other=0).to(tl.int32)
    symbol = (byte >> (part * bits)) & ((1 << bits) - 1)
    if key:
        line = (head * groups + n // group) * lines + d
    else:
        line = (head * groups + d // group) * lines + n
    lowest = tl.load(low + line, mask=here, other=0.0).to(tl.float32) * scale
    width = tl.load(step + line, mask=here, other=0.0).to(tl.float32) * scale
    lowest = tl.minimum(tl.maximum(lowest, -most), most)
    width = tl.minimum(tl.maximum(width, -most), most)
    x = lowest + symbol.to(tl.float32) * width
    x = tl.where(x < limit, x, limit)
    x = tl.where(x > -limit, x, -limit)
    tl.store(out + (head * tokens + exact + n) * dim + d, x, mask=here)
