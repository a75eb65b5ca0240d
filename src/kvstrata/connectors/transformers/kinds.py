"""What a model's cache is made of: its layers by kind, and what an object of each kind looks like.

A forward of one token says what each layer keeps; no name in a configuration is trusted for that.
Objects are portable, ``[L, S, H, T, D]``. What these classes claim is a fact only once
`kvstrata.connectors.transformers.proof.prove` has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from kvstrata.errors import Incompatible
from kvstrata.header import ObjectHeader
from kvstrata.layout import ITEM_BYTES, LayerGroup, native_order
from kvstrata.parts import PORTABLE
from kvstrata.wire import protocol as p

# These let keys of one token differ by how long its prompt is.
GROWING_ROTATIONS = ("dynamic", "longrope")


@dataclass(frozen=True)
class Kind:
    """Layers that keep the same of a token, and look back equally far.

    Args:
        group: their shape; its index is the layer group of their objects.
        layers: their numbers in the model's cache, in order.
        chunk_tokens: tokens of a chunk.
    """

    group: LayerGroup
    layers: tuple[int, ...]
    chunk_tokens: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of an object, (L, S, H, T, D)."""
        return self.group.portable_shape(self.chunk_tokens)

    @property
    def nbytes(self) -> int:
        """Of an object's payload."""
        return prod(self.shape) * self.group.item_bytes

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return getattr(torch, self.group.dtype)

    @property
    def part(self) -> int:
        """Which object of a chunk it is."""
        return self.group.index << 16

    @property
    def needs(self) -> int:
        """How many of the last chunks before a boundary it needs; 0: all."""
        window = self.group.window
        return max(1, -(-(window - 1) // self.chunk_tokens)) if window else 0

    def kept(self, num_tokens: int) -> int:
        """How many of so many tokens its layers look back to."""
        window = self.group.window
        return min(num_tokens, window - 1) if window else num_tokens

    def template(self) -> p.Template:
        """What the headers of its objects share."""
        return p.Template(
            kind="portable",
            order="",
            dtype=self.group.dtype,
            shape=list(self.shape),
            num_tokens=self.chunk_tokens,
            raw_length=self.nbytes,
            chunk_tokens=self.chunk_tokens,
            group=self.group.index,
            group_kind=self.group.kind,
            boundary=self.group.window,
            producer="transformers",
        )

    def fits(self, header: ObjectHeader) -> bool:
        """Whether an object's payload is that of such a chunk, portable or in another's order."""
        if header.kind == "native":
            tokens = native_order(header.order).block_tokens
            layers, states, heads, _, dim = self.shape
            shape: tuple[int, ...] = (
                layers, self.chunk_tokens // tokens, states, heads, tokens, dim
            )  # fmt: skip
        else:
            shape = self.shape
        return (
            header.kind in ("native", PORTABLE)
            and header.codec == "raw"
            and header.dtype == self.group.dtype
            and header.num_tokens == self.chunk_tokens
            and header.raw_length == self.nbytes
            and header.shape == shape
        )

    def describe(self) -> str:
        """In one canonical text, for the namespace."""
        group = self.group
        back = f" {group.window}" if group.window else ""
        return (
            f"{group.kind}{back}: layers {','.join(map(str, self.layers))}, {group.states} states, "
            f"{group.num_kv_heads} heads of {group.head_dim}, {group.dtype}"
        )


@dataclass(frozen=True)
class Kinds:
    """All layers of a model's cache, and where they compute.

    Args:
        each: kinds by their group's index; full attention first.
        device: of all layers.
    """

    each: tuple[Kind, ...]
    device: torch.device

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.each[0].chunk_tokens

    @property
    def layout(self) -> str:
        """The logical layout of all of them, in one canonical text."""
        return " + ".join(kind.describe() for kind in self.each)

    @property
    def needs(self) -> list[int]:
        """Of each kind as `Kind.needs`; empty: every chunk of each."""
        needs = [kind.needs for kind in self.each]
        return needs if any(needs) else []


def new_cache(model: Any) -> DynamicCache:
    """An empty cache, as the model's ``generate`` makes one for itself."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.no_grad()
def kinds_of(model: Any, chunk_tokens: int) -> Kinds:
    """What a model keeps of each token; runs one token through it.

    Raises:
        Incompatible: it has layers that are left uncached, in words.
    """
    config = model.config.get_text_config(decoder=True)
    _check_rotation(config)
    types, _ = get_layer_types_and_kwargs(config)
    cache = new_cache(model)
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Incompatible(
                f"layer {number} keeps a {type(layer).__name__} ({types[number]}), which is not "
                "cached"
            )
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        model(input_ids=token, past_key_values=cache, use_cache=True)
    except Exception as error:
        raise Incompatible(f"it does not compute one token: {error}") from error
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, layer in enumerate(cache.layers):
        alike.setdefault(_shape(number, layer, types[number]), []).append(number)
    if not alike:
        raise Incompatible("it keeps no KV")
    devices = {layer.keys.device for layer in cache.layers}
    if len(devices) > 1:
        raise Incompatible(f"its layers are on {len(devices)} devices")
    ordered = sorted(alike.items(), key=lambda item: (item[0][0] != "full", item[1][0]))
    return Kinds(
        tuple(
            Kind(
                LayerGroup(index, kind, len(layers), heads, dim, 2, dtype, window),
                tuple(layers),
                chunk_tokens,
            )
            for index, ((kind, window, heads, dim, dtype), layers) in enumerate(ordered)
        ),
        devices.pop(),
    )


def _shape(number: int, layer: Any, layer_type: str) -> tuple[Any, ...]:
    """Kind, window, heads, head size and dtype of a layer that holds one token."""
    keys, values = layer.keys, layer.values
    if keys is None or keys.shape[:1] != (1,) or keys.shape[2] != 1:
        raise Incompatible(f"layer {number} keeps no KV of a token that it has computed")
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise Incompatible(
            f"layer {number} has keys of {tuple(keys.shape)} and values of {tuple(values.shape)}"
        )
    dtype = str(keys.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise Incompatible(f"layer {number} keeps KV of dtype {dtype}")
    kind, window = "full", 0
    if type(layer) is DynamicSlidingWindowLayer:
        kind = "chunked" if layer_type == "chunked_attention" else "sliding"
        window = int(layer.sliding_window)
    return kind, window, int(keys.shape[1]), int(keys.shape[3]), dtype


def _check_rotation(config: Any) -> None:
    """Refuse rotary embeddings whose angles depend on the prompt's length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each: Sequence[Any] = [parameters, *parameters.values()]
    for one in each:
        name = one.get("rope_type") if isinstance(one, dict) else None
        if name in GROWING_ROTATIONS:
            raise Incompatible(
                f"its rotary embedding ({name}) turns the keys of one token otherwise in a longer "
                "prompt"
            )
