"""Where vLLM keeps the bytes of a block, in which order, and a proof that the order is right.

A page is one block of one layer. vLLM's tensors all advertise ``[blocks, H, N, C]``, but a backend
may pack the inside of a block otherwise, so the advertised shape proves nothing: ``describe`` names
the order, and ``self_test`` writes known keys and values through the engine's own cache-write
operation and looks where each of them went. Until that has passed no byte may be served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvstrata.errors import Incompatible, LayoutMismatch, UsageError
from kvstrata.layout import LayerGroup, NativeOrder, native_order

_CPU_ORDERS = {"vec": "cpu-vec", "vec16": "cpu-vec", "amx": "cpu-amx"}
"""Byte order of each instruction set of vLLM's CPU attention; those missing were never checked."""

_FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}

_EXACT = {
    "float32": 1 << 24,
    "float16": 1 << 11,
    "bfloat16": 1 << 8,
    "float8_e4m3fn": 1 << 4,
    "float8_e5m2": 1 << 3,
}
"""All integers below this are exact in that dtype."""

_REMEDY = (
    "KVStrata would store and serve wrong bytes here, so it refuses to start: run without it, or "
    "report this line with the vLLM version and the attention backend"
)


@dataclass(frozen=True, eq=False)
class Pages:
    """The pages of one layer group of one worker.

    Args:
        group: shape and dtype of the layers, as the core knows them.
        order: byte order inside a kernel block. ``order.block_tokens`` divides ``block_tokens``:
            where a backend's kernels take smaller blocks than the scheduler's, a page is several
            of them in a row.
        layer_names: L names in model order, the L of every payload.
        block_tokens: tokens of a scheduler block.
        page_bytes: bytes of one block of one layer, one dense run.
        num_blocks: blocks of the scheduler; 0 is its null block and never holds KV.
        bases: (L,) int64, address of block 0.
        strides: (L,) int64, bytes from one block to the next; at least page_bytes, more where the
            layout keeps the layers of a block together or pads pages.
        device: where the addresses point.
        compute_dtype: what the model hands to the cache write.
    """

    group: LayerGroup
    order: NativeOrder
    layer_names: tuple[str, ...]
    block_tokens: int
    page_bytes: int
    num_blocks: int
    bases: npt.NDArray[np.int64]
    strides: npt.NDArray[np.int64]
    device: torch.device
    compute_dtype: torch.dtype

    def run(self, layer: int, block: int) -> tuple[int, int]:
        """Address and length of one page."""
        return int(self.addresses([block])[layer, 0]), self.page_bytes

    def addresses(self, blocks: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Addresses of pages of ``page_bytes`` each.

        Args:
            blocks: block ids, any integer sequence.
        Returns:
            (L, len(blocks)) int64, in the order of a native payload.
        Raises:
            UsageError: an id outside the pool; its address would be another's memory.
        """
        ids = np.asarray(blocks, np.int64).reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_blocks:
            raise UsageError(f"block ids must lie in 0..{self.num_blocks - 1}: {ids.tolist()}")
        return self.bases[:, np.newaxis] + self.strides[:, np.newaxis] * ids

    def spans(self, blocks: npt.ArrayLike) -> list[tuple[int, int]]:
        """Cut a block list where it stops being one dense run in every layer.

        Returns:
            (index of the first block in the list, number of blocks) of each run, in order.
        """
        ids = np.asarray(blocks, np.int64).reshape(-1)
        dense = bool((self.strides == self.page_bytes).all())
        follows = (np.diff(ids) == 1) if dense else np.zeros(max(ids.size - 1, 0), bool)
        starts = [0, *(np.flatnonzero(~follows) + 1).tolist()] if ids.size else []
        return list(zip(starts, np.diff([*starts, ids.size]).tolist(), strict=True))

    def native_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """Shape (L, kernel blocks, bytes) that ``order`` converts, for whole blocks of tokens."""
        if num_tokens % self.block_tokens:
            raise UsageError(f"{num_tokens} tokens are no whole number of {self.block_tokens}")
        kernel_blocks = num_tokens // self.order.block_tokens
        return len(self.layer_names), kernel_blocks, self.order.page_bytes(self.group)


def describe(
    kv_caches: Mapping[str, torch.Tensor], vllm_config: Any, kv_cache_config: Any, group: int = 0
) -> Pages:
    """Find out how the engine keeps the pages of one KV cache group.

    Args:
        kv_caches: what ``register_kv_caches`` got: layer name to [kernel blocks, H, N, C].
        vllm_config, kv_cache_config: what the connector's constructor got.
        group: index into ``kv_cache_config.kv_cache_groups``.
    Returns:
        Addresses and a claimed order; only ``self_test`` makes it a fact.
    Raises:
        LayoutMismatch: a block is not one dense run, the layers differ, or the cache is of a kind
            that KVStrata cannot read; the message says which.
    """
    _refuse_context_parallel(vllm_config.parallel_config)
    spec = kv_cache_config.kv_cache_groups[group]
    # A layer that shares another's cache is registered too, but owns no bytes.
    owned = {name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers}
    names = tuple(sorted((n for n in spec.layer_names if n in owned), key=_model_order))
    if not names:
        raise LayoutMismatch(f"KV cache group {group} has no layers of its own")
    context = vllm_config.compilation_config.static_forward_context
    found = []
    for name in names:
        try:
            layer_spec = spec.kv_cache_spec
            if isinstance(layer_spec, UniformTypeKVCacheSpecs):
                layer_spec = layer_spec.kv_cache_specs[name]
            found.append(
                _layer(kv_caches[name], context[name], layer_spec, kv_cache_config.num_blocks)
            )
        except KeyError as error:
            raise LayoutMismatch(f"vLLM did not register layer {name} ({error})") from error
        except Incompatible as error:
            raise LayoutMismatch(f"layer {name}: {error}. {_REMEDY}") from error
        if found[-1][:-2] != found[0][:-2]:
            raise LayoutMismatch(
                f"layers {names[0]} and {name} of one group keep different pages: "
                f"{found[0][:-2]}, {found[-1][:-2]}. {_REMEDY}"
            )
    order, shape, window, block_tokens, page_bytes, *_ = found[0]
    heads, head_dim, states = shape
    layer_group = LayerGroup(
        index=group,
        kind="sliding" if window else "full",
        num_layers=len(names),
        num_kv_heads=heads,
        head_dim=head_dim,
        states=states,
        dtype=order.dtype,
        window=window,
    )
    try:
        kernel_page = order.page_bytes(layer_group)
    except LayoutMismatch as error:
        raise LayoutMismatch(f"{error}. {_REMEDY}") from error
    if page_bytes * order.block_tokens != kernel_page * block_tokens:
        raise LayoutMismatch(
            f"a block of {block_tokens} tokens takes {page_bytes} bytes where {order.name} needs "
            f"{kernel_page} for {order.block_tokens}. {_REMEDY}"
        )
    return Pages(
        group=layer_group,
        order=order,
        layer_names=names,
        block_tokens=block_tokens,
        page_bytes=page_bytes,
        num_blocks=kv_cache_config.num_blocks,
        bases=np.array([base for *_, base, _ in found], np.int64),
        strides=np.array([stride for *_, stride in found], np.int64),
        device=kv_caches[names[0]].device,
        compute_dtype=vllm_config.model_config.dtype,
    )


def attention_layers(pages: Pages, vllm_config: Any) -> dict[str, Any]:
    """The engine's attention layers behind the pages, by name."""
    context = vllm_config.compilation_config.static_forward_context
    return {name: context[name] for name in pages.layer_names}


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

    Every element of two blocks gets a number of its own, written digit by digit in integers that
    the dtype holds exactly, in as many rounds as there are digits. Read back through the addresses
    and the named order each must be in its place: any other order, even one that swaps two
    elements, fails. The two blocks are restored, whatever happens.

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
    numbers = torch.arange(int(np.prod(shape))).reshape(shape)
    rounds, place = [], 1
    while place <= numbers.numel():
        rounds.append((numbers // place % _EXACT[group.dtype]).to(torch.float32))
        place *= _EXACT[group.dtype]
    for name, tensor in zip(pages.layer_names, page_tensors(pages, kv_caches), strict=True):
        # Saved by the engine's own index, so that wrong addresses are only ever read.
        cache = kv_caches[name]
        touched = cache.unflatten(0, (pages.num_blocks, -1))
        saved = touched[blocks].clone()
        try:
            for digits in rounds:
                _write(layers[name], digits.to(pages.device), slots, pages)
                native = tensor[blocks].cpu().numpy().reshape(pages.native_shape(tokens)[1:])
                wrong = np.count_nonzero(order.unpack(native, group) != _words(digits, group))
                if wrong:
                    raise LayoutMismatch(
                        f"layer {name} does not keep its KV in the byte order {order.name}: "
                        f"{wrong} of {digits.numel()} elements are elsewhere. {_REMEDY}"
                    )
        finally:
            touched[blocks] = saved


def _write(layer: Any, kv: torch.Tensor, slots: torch.Tensor, pages: Pages) -> None:
    """Write (S, H, T, D) float32 as the model's forward would; slots are (T,) int64."""
    update = getattr(layer.impl, "do_kv_cache_update", None)
    if update is None:
        raise LayoutMismatch(
            f"{type(layer.impl).__name__} has no cache write of its own to test against. {_REMEDY}"
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
            f"{_REMEDY}"
        ) from error


def _words(digits: torch.Tensor, group: LayerGroup) -> npt.NDArray[Any]:
    """The bytes of these numbers in the cache's dtype, as unsigned integers."""
    stored = digits.to(getattr(torch, group.dtype)).contiguous()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}[group.item_bytes]
    array: npt.NDArray[Any] = stored.view(signed).numpy()
    return array.view(f"u{group.item_bytes}")


def _layer(
    cache: torch.Tensor, layer: Any, spec: Any, num_blocks: int
) -> tuple[NativeOrder, tuple[int, int, int], int, int, int, int, int]:
    """(order, (H, D, S), window, block tokens, page bytes, address of block 0, block stride)."""
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec):
        raise Incompatible(f"a KV cache of kind {type(spec).__name__} is not known")
    states = 1 if type(spec) is MLAAttentionSpec else 2
    if (
        spec.num_head_slots is not None
        or spec.state_content_bytes is not None
        or spec.tokens_per_state != 1
        or spec.head_size_v != (spec.head_size if states == 2 else 0)
    ):
        raise Incompatible(
            "its pages do not hold one key and one value of equal size for each token and head"
        )
    dtype = _dtype_name(cache.dtype, layer.kv_cache_dtype)
    if cache.ndim != 4 or cache.shape[0] % num_blocks:
        raise Incompatible(f"its tensor {tuple(cache.shape)} is not [{num_blocks} blocks, H, N, C]")
    count, heads, tokens, content = cache.shape
    if (heads, content) != (spec.num_kv_heads, states * spec.head_size):
        raise Incompatible(f"its tensor {tuple(cache.shape)} is not what {spec} declares")
    ratio = count // num_blocks
    if ratio * tokens != spec.block_size:
        raise Incompatible(f"{ratio} kernel blocks of {tokens} tokens are not {spec.block_size}")
    letters = _dense_order(cache)
    kernel_page = heads * tokens * content * cache.element_size()
    stride = cache.stride(0) * cache.element_size()
    if stride < kernel_page or (ratio > 1 and stride != kernel_page):
        raise Incompatible(
            f"blocks of {kernel_page} bytes lie {stride} bytes apart; set VLLM_KV_CACHE_LAYOUT to "
            "LBNHC or LBHNC"
        )
    backend = layer.get_attn_backend().get_name()
    if backend == "CPU_ATTN":
        if letters != ("NHC" if heads == 1 else "HNC"):
            raise Incompatible(f"CPU attention keeps its heads in an unknown order {letters}")
        isa = _cpu_isa(layer, spec)
        # An unknown instruction set goes into the name, where the registry refuses it.
        letters = _CPU_ORDERS.get(isa, f"cpu-{isa}")
    else:
        letters = f"strided-{letters}"
    return (
        native_order(f"vllm/{letters}/b{tokens}/{dtype}"),
        (heads, spec.head_size, states),
        getattr(spec, "sliding_window", 0) if type(spec) is SlidingWindowSpec else 0,
        spec.block_size,
        kernel_page * ratio,
        cache.data_ptr(),
        stride * ratio,
    )


def _dense_order(cache: torch.Tensor) -> str:
    """Memory order of H, N, C inside a block, slow to fast, as letters.

    Raises:
        Incompatible: the block is not one dense run.
    """
    axes = [(cache.stride(i), i) for i in (1, 2, 3) if cache.shape[i] > 1]
    expected = 1
    for stride, axis in sorted(axes):
        if stride != expected:
            raise Incompatible(
                f"a block of {tuple(cache.shape[1:])} with strides {cache.stride()[1:]} is not "
                "one dense run; set VLLM_KV_CACHE_LAYOUT to LBNHC, LBHNC, BLNHC or BLHNC"
            )
        expected *= cache.shape[axis]
    letters = "".join("BHNC"[axis] for _, axis in sorted(axes, reverse=True))
    # With one head its place is arbitrary; one name for equal bytes.
    return letters if "H" in letters else letters.replace("N", "NH")


def _cpu_isa(layer: Any, spec: Any) -> str:
    isa = getattr(layer, "isa", None)
    if isa is None:
        # Set by the metadata builder, which a future vLLM may build after registration.
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(layer.dtype, spec.block_size, spec.head_size, layer.kv_cache_dtype)
    return str(isa)


def _dtype_name(dtype: torch.dtype, kv_cache_dtype: str) -> str:
    name = str(dtype).removeprefix("torch.")
    if name in ("bfloat16", "float16", "float32"):
        return name
    if kv_cache_dtype in _FP8 and dtype.itemsize == 1:
        return _FP8[kv_cache_dtype]
    raise Incompatible(f"a KV cache of dtype {kv_cache_dtype} ({name}) is not known")


def _refuse_context_parallel(parallel_config: Any) -> None:
    for kind in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel_config, kind, 1) > 1:
            raise LayoutMismatch(
                f"with {kind} > 1 a block holds every n-th token, which KVStrata cannot key; "
                "set it to 1 or run without KVStrata"
            )


def _model_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
