"""HiCache's `direct` copies between the engine's pool and the host's, for an engine on the CPU.

Pools of the engine hold a layer each, (tokens, heads, size) or (tokens, ...). Host pools do so too
(*layer first*), or hold whole pages, (pages, layers, tokens of a page, ...) (*page first*). Indices
are tokens', and come in whole pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def _pages(tokens: torch.Tensor, page_size: int) -> torch.Tensor:
    """The pages that these tokens fill."""
    return tokens[::page_size] // page_size


def transfer_kv_direct(
    *,
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy tokens, layer by layer, where both sides are layer first."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    *,
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Copy one layer out of a host pool that is page first; a source each for keys and values."""
    pages = _pages(src_indices, page_size)
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[pages, layer_id].flatten(0, 1)


def transfer_kv_all_layer_direct_lf_pf(
    *,
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy all layers into a host pool that is page first; the sources are all layers' keys, then
    all layers' values."""
    pages = _pages(dst_indices, page_size)
    num_layers = len(src_ptrs) // len(dst_ptrs)
    for state, target in enumerate(dst_ptrs):
        for layer in range(num_layers):
            source = src_ptrs[state * num_layers + layer]
            target[pages, layer] = source[src_indices].unflatten(0, (-1, page_size))
