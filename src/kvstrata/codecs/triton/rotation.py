"""The kernels of `triton_rotated`: each does what a loop of `rotation` does, in the same order.

A transform pairs the channels that differ in one bit of their number, from the lowest bit up, each
sum of two numbers: no order within a step could matter. Sums over tokens or over channels walk
along them as the CPU does, with one lane a line.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def rotate_kernel(  # type: ignore[no-untyped-def]
    numbers,
    factors,
    tile,
    count,
    dim,
    steps: tl.constexpr,
    tokens: tl.constexpr,
    width: tl.constexpr,
):
    """Numbers (H, count, D) times factors (D,), transformed, to a tile (H, D, count)."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * tokens + tl.arange(0, tokens)[:, None]
    d = tl.arange(0, width)[None, :]
    here = (i < count) & (d < dim)
    x = tl.load(numbers + (head * count + i) * dim + d, mask=here, other=0.0)
    x = _transform(x * tl.load(factors + d, mask=d < dim, other=0.0), steps, tokens, width)
    tl.store(tile + (head * dim + d) * count + i, x, mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def mean_kernel(tile, means, dim, count, size, lines: tl.constexpr):  # type: ignore[no-untyped-def]
    """Means (H, D) of a tile (H, D, count)."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * lines + tl.arange(0, lines)
    here = d < dim
    total = tl.zeros([lines], tl.float32)
    for i in range(count):
        total += tl.load(tile + (head * dim + d) * count + i, mask=here, other=0.0)
    mean = tl.div_rn(total, tl.zeros_like(total) + size)
    tl.store(means + head * dim + d, mean.to(tl.float16), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def quantise_kernel(  # type: ignore[no-untyped-def]
    tile,
    means,
    levels,
    edges,
    scales,
    symbols,
    dim,
    count,
    size,
    has_means: tl.constexpr,
    num_levels: tl.constexpr,
    lines: tl.constexpr,
):
    """Scales (H, count) and symbols (H, D, count) of a tile."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * lines + tl.arange(0, lines)
    here = i < count
    place = tl.arange(0, num_levels)[None, :]
    edge = tl.load(edges + place, mask=place < num_levels - 1, other=float("inf"))
    power, cross = tl.zeros([lines], tl.float32), tl.zeros([lines], tl.float32)
    for d in range(dim):
        x = tl.load(tile + (head * dim + d) * count + i, mask=here, other=0.0)
        if has_means:
            x -= tl.load(means + head * dim + d).to(tl.float32)
        power += x * x
    root = tl.sqrt_rn(tl.div_rn(power, tl.zeros_like(power) + size))
    inverse = tl.where(root > 0, tl.div_rn(tl.full([lines], 1.0, tl.float32), root), 0.0)
    for d in range(dim):
        x = tl.load(tile + (head * dim + d) * count + i, mask=here, other=0.0)
        if has_means:
            x -= tl.load(means + head * dim + d).to(tl.float32)
        unit = x * inverse
        symbol = tl.sum((unit[:, None] > edge).to(tl.int32), 1)
        cross += x * tl.load(levels + symbol)
        tl.store(symbols + (head * dim + d) * count + i, symbol.to(tl.uint8), mask=here)
    scale = tl.where(cross > 0, tl.div_rn(power, cross), 0.0)
    tl.store(scales + head * count + i, scale.to(tl.float16), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def restore_kernel(  # type: ignore[no-untyped-def]
    lower,
    upper,
    means,
    scales,
    levels,
    factors,
    out,
    stride,
    dim,
    count,
    scale,
    limit,
    has_means: tl.constexpr,
    lower_bits: tl.constexpr,
    upper_bits: tl.constexpr,
    steps: tl.constexpr,
    tokens: tl.constexpr,
    width: tl.constexpr,
):
    """Planes of symbols to numbers (H, count, D); from head to head there are ``stride`` tokens."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * tokens + tl.arange(0, tokens)[:, None]
    d = tl.arange(0, width)[None, :]
    here = (i < count) & (d < dim)
    symbol = _plane(lower, head * dim + d, i, count, here, lower_bits)
    if upper_bits > 0:
        symbol += _plane(upper, head * dim + d, i, count, here, upper_bits) << lower_bits
    x = tl.load(levels + symbol)
    size = tl.load(scales + head * count + i, mask=i < count, other=0.0).to(tl.float32)
    mean = tl.zeros([1, width], tl.float32)  # of values too: -0 becomes 0 by it, as on the CPU
    if has_means:
        mean = tl.load(means + head * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    x = _transform(tl.where(here, mean + x * size, 0.0), steps, tokens, width)
    # The power of two comes last: before it, no sum can overflow.
    x = x * tl.load(factors + d, mask=d < dim, other=0.0) * scale
    x = tl.where(x < limit, x, limit)
    x = tl.where(x > -limit, x, -limit)
    tl.store(out + (head * stride + i) * dim + d, x, mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _transform(x, steps: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Walsh-Hadamard transform of (tokens, width) over every 2**steps channels."""
    d = tl.arange(0, width)[None, :] + tl.zeros([tokens, width], tl.int32)
    for step in tl.static_range(steps):
        other = tl.gather(x, d ^ (1 << step), 1)
        x = tl.where((d & (1 << step)) == 0, x + other, other - x)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _plane(packed, row, i, count, here, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some bits of the symbols of rows, one block of ``count`` symbols each: see `packing`."""
    per_byte: tl.constexpr = 8 // bits
    row_bytes = (count + per_byte - 1) // per_byte
    byte = tl.load(packed + row * row_bytes + i % row_bytes, mask=here, other=0).to(tl.int32)
    return (byte >> (i // row_bytes * bits)) & ((1 << bits) - 1)
