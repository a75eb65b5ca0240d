"""A proof that the bytes of a block lie where `describe` says: known keys and values go through the
engine's own cache-write operation, and each of them must be found in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kvstrata.connectors.digits import rounds, words
from kvstrata.connectors.vllm.pages import REMEDY, Pages
from kvstrata.errors import LayoutMismatch


def page_tensors(pages: Pages, kv_caches: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The pages as tensors: for each layer (num_blocks, page_bytes) uint8 on the device.

    Views of the engine's memory built from the addresses alone, so what is read through them is
    what a copy by address would read.

    Raises:
        LayoutMismatch: the addresses leave the registered storage.
    """
    tensors = []
    for layer, name in enumerate(pages.layer_names):
        storage = kv_caches[name].untyped_storage()
        start = int(pages.bases[layer]) - storage.data_ptr()
        stride = int(pages.strides[layer])
        end = start + stride * (pages.num_blocks - 1) + pages.page_bytes
        if start < 0 or end > storage.nbytes():
            raise LayoutMismatch(f"layer {name}: pages {start}..{end} leave the cache's memory")
        raw = torch.empty(0, dtype=torch.uint8, device=pages.device).set_(storage)
        tensors.append(raw.as_strided((pages.num_blocks, pages.page_bytes), (stride, 1), start))
    return tensors


@torch.no_grad()
def self_test(
    pages: Pages, kv_caches: Mapping[str, torch.Tensor], layers: Mapping[str, Any]
) -> None:
    """Prove addresses and byte order of every layer against the engine's own cache write.

    Every element of two blocks gets a number of its own (`kvstrata.connectors.digits`). Read back
    through the addresses and the named order each must be in its place: any other order, even one
    that swaps two elements, fails. The two blocks are restored, whatever happens.

    Must run when nothing else uses the cache: at registration. Blocks; on the CPU a few
    milliseconds a layer.

    Args:
        layers: the engine's attention layers, by name.
    Raises:
        LayoutMismatch: an element was elsewhere, or the engine offers no way to write.
    """
    group, order = pages.group, pages.order
    blocks = sorted({min(1, pages.num_blocks - 1), pages.num_blocks - 1})
    tokens = len(blocks) * pages.block_tokens
    slots = torch.tensor(blocks).repeat_interleave(pages.block_tokens) * pages.block_tokens
    slots = (slots + torch.arange(pages.block_tokens).repeat(len(blocks))).to(pages.device)
    shape = (group.states, group.num_kv_heads, tokens, group.head_dim)
    written = list(rounds(shape, group.dtype))
    for name, tensor in zip(pages.layer_names, page_tensors(pages, kv_caches), strict=True):
        # Saved by the engine's own index, so that wrong addresses are only ever read.
        cache = kv_caches[name]
        touched = cache.unflatten(0, (pages.num_blocks, -1))
        saved = touched[blocks].clone()
        try:
            for digits in written:
                _write(layers[name], digits.to(pages.device), slots, pages)
                native = tensor[blocks].cpu().numpy().reshape(pages.native_shape(tokens)[1:])
                wrong = np.count_nonzero(order.unpack(native, group) != words(digits, group.dtype))
                if wrong:
                    raise LayoutMismatch(
                        f"layer {name} does not keep its KV in the byte order {order.name}: "
                        f"{wrong} of {digits.numel()} elements are elsewhere. {REMEDY}"
                    )
        finally:
            touched[blocks] = saved


def _write(layer: Any, kv: torch.Tensor, slots: torch.Tensor, pages: Pages) -> None:
    """Write (S, H, T, D) float32 as the model's forward would; slots are (T,) int64."""
    update = getattr(layer.impl, "do_kv_cache_update", None)
    if update is None:
        raise LayoutMismatch(
            f"{type(layer.impl).__name__} has no cache write of its own to test against. {REMEDY}"
        )
    # fp8 backends divide by the scale on the way in.
    scales = [1.0] * len(kv)
    if pages.group.item_bytes == 1:
        scales = [float(layer._k_scale), float(layer._v_scale)][: len(kv)]
    rows = [
        (state * scale).transpose(0, 1).to(pages.compute_dtype).contiguous()
        for state, scale in zip(kv, scales, strict=True)
    ]
    try:
        if len(rows) == 2:
            update(layer, *rows, layer.kv_cache, slots)
        else:
            latent, rope = rows[0].split([layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1)
            update(
                latent.squeeze(1).contiguous(),
                rope.contiguous(),
                layer.kv_cache,
                slots,
                layer.kv_cache_dtype,
                layer._k_scale,
            )
    except Exception as error:
        raise LayoutMismatch(
            f"the cache write of {type(layer.impl).__name__} failed in the self-test: {error}. "
            f"{REMEDY}"
        ) from error
