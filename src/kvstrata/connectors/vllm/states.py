"""Recurrent states: where vLLM keeps one, and a proof that these bytes are all of it.

A state has no tokens. A block of a layer holds the layer's state tensors one behind the other, for
Mamba those of the convolution and of the recurrence. Nothing here knows what a number means: the
order's name pins all that decides it, and no codec that computes with numbers takes such a payload.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.v1.kv_cache_interface import MambaSpec

from kvstrata.connectors.vllm.pages import REMEDY, Pages, owned_layers
from kvstrata.connectors.vllm.proof import page_tensors
from kvstrata.errors import LayoutMismatch
from kvstrata.layout import ITEM_BYTES, LayerGroup, NativeOrder


def describe_states(
    kv_caches: Mapping[str, torch.Tensor], vllm_config: Any, kv_cache_config: Any, group: int
) -> Pages:
    """Find out how the engine keeps the states of one KV cache group; as `pages.describe`.

    Raises:
        LayoutMismatch: a block is not one dense run, or the layers differ.
    """
    spec: MambaSpec = kv_cache_config.kv_cache_groups[group].kv_cache_spec
    names = owned_layers(kv_cache_config, group)
    num_blocks, nbytes = kv_cache_config.num_blocks, spec.state_content_size_bytes
    caches = []
    for name in names:
        cache = kv_caches.get(name)
        if cache is None:
            raise LayoutMismatch(f"vLLM did not register layer {name}")
        if tuple(cache.shape) != (num_blocks, 1, 1, nbytes) or cache.dtype != torch.int8:
            raise LayoutMismatch(
                f"layer {name}: its tensor {tuple(cache.shape)} of {cache.dtype} is not "
                f"[{num_blocks} blocks, 1, 1, {nbytes} bytes]. {REMEDY}"
            )
        if cache.stride(3) != 1 or cache.stride(0) < nbytes:
            raise LayoutMismatch(f"layer {name}: a state is not one dense run. {REMEDY}")
        caches.append(cache)
    dtype = _dtype(spec, nbytes)
    about = (
        f"{spec.mamba_type.name} {spec.shapes} {spec.dtypes} {spec.mamba_cache_mode} "
        f"{is_conv_state_dim_first()} {caches[0].device.type} "
        f"{torch.backends.cpu.get_cpu_capability() if caches[0].device.type == 'cpu' else ''}"
    )
    kind = spec.mamba_type.name.lower()[:24]
    name = f"vllm/state-{kind}/{blake3(about.encode()).hexdigest()[:16]}"
    return Pages(
        group=LayerGroup(
            index=group,
            kind="recurrent",
            num_layers=len(names),
            num_kv_heads=1,
            head_dim=nbytes // ITEM_BYTES[dtype],
            states=1,
            dtype=dtype,
        ),
        order=NativeOrder(name, spec.block_size, dtype, ("D", "D")),
        layer_names=names,
        block_tokens=spec.block_size,
        page_bytes=nbytes,
        num_blocks=num_blocks,
        bases=np.array([cache.data_ptr() for cache in caches], np.int64),
        strides=np.array([cache.stride(0) for cache in caches], np.int64),
        device=caches[0].device,
        compute_dtype=vllm_config.model_config.dtype,
    )


@torch.no_grad()
def prove_states(
    pages: Pages, kv_caches: Mapping[str, torch.Tensor], layers: Mapping[str, Any]
) -> None:
    """Prove that a page holds a layer's states, all of them and nothing else.

    What is written through the tensors that the layer's kernels use must be found at the page's
    address, byte for byte. The two blocks are restored, whatever happens.

    Raises:
        LayoutMismatch: it was not.
    """
    blocks = sorted({min(1, pages.num_blocks - 1), pages.num_blocks - 1})
    for name, tensor in zip(pages.layer_names, page_tensors(pages, kv_caches), strict=True):
        cache = kv_caches[name]
        saved = cache[blocks].clone()
        written = []
        try:
            for state in layers[name].kv_cache:
                nbytes = prod(state.shape[1:]) * state.dtype.itemsize
                # Bytes below 64 are numbers of every kind, none of them "not a number".
                noise = torch.randint(0, 64, (len(blocks), nbytes), dtype=torch.uint8)
                rows = noise.to(state.device).view(state.dtype)
                state[blocks] = rows.view(len(blocks), *state.shape[1:])
                written.append(noise)
            if not torch.equal(tensor[blocks].cpu(), torch.cat(written, dim=1)):
                raise LayoutMismatch(
                    f"layer {name} does not keep its states in the {pages.page_bytes} bytes of a "
                    f"block, one behind the other. {REMEDY}"
                )
        finally:
            cache[blocks] = saved


def _dtype(spec: MambaSpec, nbytes: int) -> str:
    """The widest element of the states that fills a page: what a lossless codec splits it by."""
    names = [str(dtype).removeprefix("torch.") for dtype in spec.dtypes]
    if unknown := [name for name in names if name not in ITEM_BYTES]:
        raise LayoutMismatch(f"a state of dtype {unknown[0]} is not known. {REMEDY}")
    fitting = [name for name in names if nbytes % ITEM_BYTES[name] == 0]
    return max(fitting, key=lambda name: ITEM_BYTES[name])
