"""`rotated` on a GPU: the bytes and the numbers of the CPU, group by group of 128 tokens."""

from __future__ import annotations

import torch
import triton

from kvstrata.codecs.base import Payload, corrupt
from kvstrata.codecs.packing import LARGEST, MAX_BIASED, power_of_two, row_bytes
from kvstrata.codecs.rotated import BINADE, PLANES, Group, Rotated
from kvstrata.codecs.rotation import block_of, edges_of, levels_of, norms, signs
from kvstrata.codecs.sinks import SINKS, num_exact
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
from kvstrata.codecs.triton.rotation import (
    mean_kernel,
    quantise_kernel,
    restore_kernel,
    rotate_kernel,
)

_LINES = 64
_TILE_ELEMENTS = 2048


def encode_numbers(codec: Rotated, numbers: torch.Tensor, payload: Payload) -> torch.Tensor:
    """What ``codec.encode_numbers`` writes of the finite ``numbers``, float32 (S, H, T, D)."""
    pieces = [store_exact(numbers, num_exact(SINKS, payload), payload)]
    for group in codec.groups(payload):
        values = numbers[group.state, :, group.begin : group.begin + group.num_tokens].contiguous()
        biased = exponents(largest(values), BINADE)
        means, scales, symbols = _quantise(_rotate(values, inverses(biased)), group)
        rows, lowest = symbols.reshape(-1, group.num_tokens), 0
        pieces += [biased, as_bytes(means), as_bytes(scales)]
        for bits in PLANES[group.bits]:
            pieces.append(as_bytes(pack(rows, group.num_tokens, bits, lowest)))
            lowest += bits
    return torch.cat(pieces)


def decode_numbers(
    codec: Rotated, frame: torch.Tensor, payload: Payload, out: torch.Tensor
) -> None:
    """What ``codec.decode_numbers`` does; its errors too. ``out``: float32 (S, H, T, D)."""
    if frame.numel() != codec.numbers_bound(payload):
        raise corrupt(f"{frame.numel()} bytes, not {codec.numbers_bound(payload)}")
    begin = load_exact(frame, num_exact(SINKS, payload), payload, out)
    for group in codec.groups(payload):
        biased = int(frame[begin])
        halves = of_bytes(frame[begin + 1 : begin + 1 + 2 * group.num_halves], torch.float16)
        if biased > MAX_BIASED or not bool(halves.isfinite().all()):
            raise corrupt(f"state {group.state} has a scale that is not finite")
        packed = frame[begin + 1 + 2 * group.num_halves : begin + group.nbytes]
        begin += group.nbytes
        _restore(packed, halves, power_of_two(biased), LARGEST[payload.dtype], group, out)


def _rotate(values: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Numbers (H, tokens, D) to a tile (H, D, tokens), as `rotation.rotate` does."""
    heads, count, dim = values.shape
    sign = torch.from_numpy(signs(dim)).to(values.device)
    tile = torch.empty((heads, dim, count), dtype=torch.float32, device=values.device)
    tokens, width = _tile(dim)
    rotate_kernel[(heads, triton.cdiv(count, tokens))](
        values,
        sign * (inverse * norms(dim)[0]),
        tile,
        count,
        dim,
        block_of(dim).bit_length() - 1,
        tokens,
        width,
        enable_fp_fusion=False,
    )
    return tile


def _quantise(tile: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means, scales and symbols of a tile, as `rotation.quantise` gives them."""
    heads, dim, count = tile.shape
    levels = levels_of(group.bits)
    means = torch.empty((heads, dim * group.key), dtype=torch.float16, device=tile.device)
    scales = torch.empty((heads, count), dtype=torch.float16, device=tile.device)
    symbols = torch.empty(tile.shape, dtype=torch.uint8, device=tile.device)
    if group.key:
        mean_kernel[(heads, triton.cdiv(dim, _LINES))](
            tile, means, dim, count, float(count), _LINES, enable_fp_fusion=False
        )
    quantise_kernel[(heads, triton.cdiv(count, _LINES))](
        tile,
        means,
        torch.from_numpy(levels).to(tile.device),
        torch.from_numpy(edges_of(levels)).to(tile.device),
        scales,
        symbols,
        dim,
        count,
        float(dim),
        group.key,
        len(levels),
        _LINES,
        enable_fp_fusion=False,
    )
    return means, scales, symbols


def _restore(
    packed: torch.Tensor,
    halves: torch.Tensor,
    scale: float,
    limit: float,
    group: Group,
    out: torch.Tensor,
) -> None:
    """Numbers of a group into its tokens of ``out`` (S, H, T, D), as `rotation.restore` gives."""
    heads, dim, count = group.shape
    state = out[group.state]
    planes = (*PLANES[group.bits], 0)
    tokens, width = _tile(dim)
    restore_kernel[(heads, triton.cdiv(count, tokens))](
        packed,
        packed[heads * dim * row_bytes(count, count, planes[0]) :],
        halves,
        halves[group.num_halves - heads * count :],
        torch.from_numpy(levels_of(group.bits)).to(out.device),
        torch.from_numpy(signs(dim)).to(out.device) * norms(dim)[1],
        state[:, group.begin :],
        state.shape[1],
        dim,
        count,
        scale,
        limit,
        group.key,
        planes[0],
        planes[1],
        block_of(dim).bit_length() - 1,
        tokens,
        width,
        enable_fp_fusion=False,
    )


def _tile(dim: int) -> tuple[int, int]:
    """Tokens and channels, all of them, of a program that transforms."""
    width = triton.next_power_of_2(dim)
    return max(1, _TILE_ELEMENTS // width), width
