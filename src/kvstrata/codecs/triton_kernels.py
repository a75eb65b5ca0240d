"""The encoder of `quantized` on a GPU, byte for byte what the CPU writes.

Each program has one group of one head and some of its columns, and walks along the group as the
loops of `ranges` do: sums in the same order, no fused multiply-add, divisions rounded correctly.
Runs in Triton's interpreter too, where TRITON_INTERPRET=1 is set before this module is imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvstrata.codecs.base import Payload, floating
from kvstrata.codecs.packing import exponent_of, power_of_two
from kvstrata.codecs.quantized import BINADE, FIRST, Quantized
from kvstrata.codecs.ranges import ROUNDS

_COLUMNS = 64


def encode_layer(codec: Quantized, values: torch.Tensor, payload: Payload) -> torch.Tensor:
    """Encode one layer where it lies.

    Args:
        codec: the method.
        values: (S, H, T, D), finite numbers of the payload's dtype, on a GPU.
        payload: of which it is a layer.
    Returns:
        uint8, on the same device: what ``codec.encode_layer`` writes. Blocks, for two scalars.
    """
    floating(payload)
    exact = codec.num_exact(payload)
    parts = [torch.ones(1, dtype=torch.uint8, device=values.device), _bytes(values[:, :, :exact])]
    for state, part in enumerate(codec.parts(payload)):
        rest = values[state, :, exact:].float()
        biased = exponent_of(float(rest.abs().max()) if rest.numel() else 0.0, BINADE)
        scaled = rest * (1 / power_of_two(biased))
        columns = (scaled if part.key else scaled.transpose(1, 2)).contiguous()
        heads, count, across = columns.shape
        ranges = torch.empty(part.ranges, dtype=torch.float16, device=values.device)
        symbols = torch.empty(columns.shape, dtype=torch.uint8, device=values.device)
        if columns.numel():
            _quantise[(heads, part.ranges[2], triton.cdiv(across, _COLUMNS))](
                columns,
                ranges[0],
                ranges[1],
                symbols,
                count,
                across,
                part.ranges[2],
                part.group,
                2**codec.bits - 1,
                FIRST[codec.bits],
                codec.fit,
                ROUNDS,
                _COLUMNS,
                enable_fp_fusion=False,
            )
        rows = symbols if part.key else symbols.transpose(1, 2)
        head = torch.full((1,), biased, dtype=torch.uint8, device=values.device)
        parts += [head, _bytes(ranges), _packed(rows, part.block, codec.bits)]
    return torch.cat(parts)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _packed(rows: torch.Tensor, block: int, bits: int) -> torch.Tensor:
    """What `packing.pack` does, block by block of the last axis."""
    packed = []
    for symbols in rows.split(block, dim=-1):
        count = -(-symbols.shape[-1] * bits // 8)
        whole = torch.nn.functional.pad(symbols, (0, count * (8 // bits) - symbols.shape[-1]))
        out = whole[..., :count].clone()
        for part in range(1, 8 // bits):
            out |= whole[..., part * count : (part + 1) * count] << (part * bits)
        packed.append(out)
    return torch.cat(packed, dim=-1).reshape(-1)


@triton.jit  # type: ignore[untyped-decorator]
def _quantise(  # type: ignore[no-untyped-def]
    columns,
    low_out,
    step_out,
    symbols,
    count,
    across,
    groups,
    group,
    top,
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
    most = top.to(tl.float32)
    low = tl.load(base + begin * across, mask=here, other=0.0)
    high = low
    for n in range(begin + 1, end):
        x = tl.load(base + n * across, mask=here, other=0.0)
        low, high = tl.minimum(low, x), tl.maximum(high, x)
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
                y = tl.floor(tl.minimum(tl.maximum((x - low) * inverse + 0.5, 0.0), most))
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
