"""Bytes on a GPU, with torch's own operations: planes of symbols, powers of two, exact tokens.

Nothing here rounds, so the order of the work does not matter. No operation waits for the GPU.
"""

from __future__ import annotations

import torch

from kvstrata.codecs.base import Payload
from kvstrata.codecs.packing import MAX_BIASED, exponent_of, row_bytes
from kvstrata.codecs.sinks import exact_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_ZERO = exponent_of(0.0, 0)  # the byte of 2**0


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in C order, (nbytes,) uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def of_bytes(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of bytes as elements of ``dtype``, (n,): a frame's slice may lie at an odd address."""
    return data.clone().view(dtype)


def largest(numbers: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, (1,) float32; 0 of no numbers."""
    if not numbers.numel():
        return torch.zeros(1, device=numbers.device)
    return numbers.abs().amax().reshape(1)


def exponents(magnitudes: torch.Tensor, binade: int) -> torch.Tensor:
    """`packing.exponent_of` for every magnitude, float32; uint8 of the same shape."""
    power = (magnitudes.view(torch.int32) >> 23) - 126 - binade
    power = torch.where(magnitudes == 0, 0, power)
    return (power + _ZERO).clamp(0, MAX_BIASED).to(torch.uint8)


def inverses(biased: torch.Tensor) -> torch.Tensor:
    """2**-e for what `exponents` returned, float32."""
    return ((127 + _ZERO - biased.to(torch.int32)) << 23).view(torch.float32)


def pack(symbols: torch.Tensor, block: int, bits: int, lowest: int) -> torch.Tensor:
    """What `packing.pack` writes: (..., W) uint8 to (..., `row_bytes`)."""
    mask, per_byte = 2**bits - 1, 8 // bits
    packed = []
    for plane in ((symbols >> lowest) & mask).split(block, dim=-1):
        count = row_bytes(plane.shape[-1], block, bits)
        whole = torch.nn.functional.pad(plane, (0, count * per_byte - plane.shape[-1]))
        out = whole[..., :count].clone()
        for part in range(1, per_byte):
            out |= whole[..., part * count : (part + 1) * count] << (part * bits)
        packed.append(out)
    return torch.cat(packed, dim=-1)


def store_exact(numbers: torch.Tensor, count: int, payload: Payload) -> torch.Tensor:
    """`sinks.store_exact`: the bytes of the first ``count`` tokens of (S, H, T, D)."""
    return as_bytes(numbers[:, :, :count].to(DTYPES[payload.dtype]))


def load_exact(frame: torch.Tensor, count: int, payload: Payload, out: torch.Tensor) -> int:
    """`sinks.load_exact`: the first ``count`` tokens of ``out``, float32 (S, H, T, D)."""
    size = exact_bytes(count, payload)
    states, heads, _, dim = out.shape
    words = of_bytes(frame[:size], DTYPES[payload.dtype])
    out[:, :, :count] = words.reshape(states, heads, count, dim)
    return size
