"""Where vLLM keeps the bytes of a block, and in which order, as far as its tensors tell.

A page is one block of one layer. vLLM's tensors all advertise ``[blocks, H, N, C]``, but a backend
may pack the inside of a block otherwise, so the advertised shape proves nothing: ``describe`` names
the order, and until ``proof.self_test`` has passed no byte may be served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from kvstrata.connectors.vllm.groups import KINDS
from kvstrata.errors import Incompatible, LayoutMismatch, UsageError
from kvstrata.header import GroupKind
from kvstrata.layout import LayerGroup, NativeOrder, native_order

_CPU_ORDERS = {"vec": "cpu-vec", "vec16": "cpu-vec", "amx": "cpu-amx"}
"""Byte order of each instruction set of vLLM's CPU attention; those missing were never checked."""

_FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}

REMEDY = (
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

    def of_heads(self, heads: range) -> Pages:
        """The pages of some KV heads alone, each a run within the whole page.

        Args:
            heads: of this worker's, counted from 0.
        Raises:
            Incompatible: the engine does not keep them in one run.
        """
        num_heads = self.group.num_kv_heads
        if len(heads) == num_heads:
            return self
        if not self.order.by_head:
            raise Incompatible(
                f"its pages keep tokens before heads ({self.order.name}); set "
                "VLLM_KV_CACHE_LAYOUT to LBHNC"
            )
        if self.block_tokens != self.order.block_tokens:
            raise Incompatible(
                f"its kernels take blocks of {self.order.block_tokens} tokens, of which vLLM makes "
                f"blocks of {self.block_tokens}; set --block-size to {self.order.block_tokens}"
            )
        each = self.page_bytes // num_heads
        return replace(
            self,
            group=replace(self.group, num_kv_heads=len(heads)),
            order=_order_of_one_head(self.order) if len(heads) == 1 else self.order,
            page_bytes=len(heads) * each,
            bases=self.bases + heads.start * each,
        )


def describe(
    kv_caches: Mapping[str, torch.Tensor], vllm_config: Any, kv_cache_config: Any, group: int = 0
) -> Pages:
    """Find out how the engine keeps the pages of one KV cache group.

    Args:
        kv_caches: what ``register_kv_caches`` got: layer name to [kernel blocks, H, N, C].
        vllm_config: what the connector's constructor got.
        kv_cache_config: the same, cut by shape.
        group: index into ``kv_cache_config.kv_cache_groups``.
    Returns:
        Addresses and a claimed order; only ``proof.self_test`` makes it a fact.
    Raises:
        LayoutMismatch: a block is not one dense run, the layers differ, or the cache is of a kind
            that KVStrata cannot read; the message says which.
    """
    _refuse_context_parallel(vllm_config.parallel_config)
    spec = kv_cache_config.kv_cache_groups[group].kv_cache_spec
    names = owned_layers(kv_cache_config, group)
    context = vllm_config.compilation_config.static_forward_context
    found = []
    for name in names:
        try:
            found.append(_layer(kv_caches[name], context[name], spec, kv_cache_config.num_blocks))
        except KeyError as error:
            raise LayoutMismatch(f"vLLM did not register layer {name} ({error})") from error
        except Incompatible as error:
            raise LayoutMismatch(f"layer {name}: {error}. {REMEDY}") from error
        if found[-1][:-2] != found[0][:-2]:
            raise LayoutMismatch(
                f"layers {names[0]} and {name} of one group keep different pages: "
                f"{found[0][:-2]}, {found[-1][:-2]}. {REMEDY}"
            )
    order, shape, kind, window, block_tokens, page_bytes, *_ = found[0]
    heads, head_dim, states = shape
    layer_group = LayerGroup(
        index=group,
        kind=kind,
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
        raise LayoutMismatch(f"{error}. {REMEDY}") from error
    if page_bytes * order.block_tokens != kernel_page * block_tokens:
        raise LayoutMismatch(
            f"a block of {block_tokens} tokens takes {page_bytes} bytes where {order.name} needs "
            f"{kernel_page} for {order.block_tokens}. {REMEDY}"
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


def owned_layers(kv_cache_config: Any, group: int) -> tuple[str, ...]:
    """Names of the layers of a group that own bytes, in model order.

    A layer that shares another's cache is registered too, but owns none.

    Raises:
        LayoutMismatch: there is no such layer.
    """
    owned = {name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers}
    names = kv_cache_config.kv_cache_groups[group].layer_names
    found = tuple(sorted((name for name in names if name in owned), key=_model_order))
    if not found:
        raise LayoutMismatch(f"KV cache group {group} has no layers of its own")
    return found


def attention_layers(pages: Pages, vllm_config: Any) -> dict[str, Any]:
    """The engine's layers behind the pages, by name."""
    context = vllm_config.compilation_config.static_forward_context
    return {name: context[name] for name in pages.layer_names}


def _layer(
    cache: torch.Tensor, layer: Any, spec: Any, num_blocks: int
) -> tuple[NativeOrder, tuple[int, int, int], GroupKind, int, int, int, int, int]:
    """(order, (H, D, S), kind, window, block tokens, page bytes, address of block 0, stride)."""
    if type(spec) not in KINDS:
        raise Incompatible(f"a KV cache of kind {type(spec).__name__} is not known")
    kind, window = KINDS[type(spec)]
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
        kind,
        getattr(spec, window) if window else 0,
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


def _order_of_one_head(order: NativeOrder) -> NativeOrder:
    """The same order of pages that have one head, by the one name that it has then."""
    engine, letters, *rest = order.name.split("/")
    if letters.startswith("strided-"):
        letters = letters.replace("H", "").replace("N", "NH")
    return native_order("/".join((engine, letters, *rest)))


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
