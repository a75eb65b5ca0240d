"""Between transformers' `DynamicCache` and chunks: what is put into one, and taken out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstrata.connectors.transformers.kinds import Kind, Kinds
from kvstrata.layout import native_order

Bytes = npt.NDArray[np.uint8]


class Filling:
    """Host memory that chunks are gathered in before they go into a cache.

    Args:
        kinds: of the model's layers.
        num_chunks: before the boundary that is loaded.
    """

    def __init__(self, kinds: Kinds, num_chunks: int) -> None:
        self._kinds = kinds
        self._first = [max(0, num_chunks - kind.needs) if kind.needs else 0 for kind in kinds.each]
        self._buffers = [
            torch.empty(
                kind.group.portable_shape((num_chunks - first) * kind.chunk_tokens),
                dtype=kind.dtype,
            )
            for kind, first in zip(kinds.each, self._first, strict=True)
        ]

    def put(self, kind: Kind, number: int, payload: Bytes, order: str = "") -> None:
        """Copy an object's payload in.

        Args:
            number: of the chunk; not before the first one that the kind needs.
            payload: (nbytes,) uint8.
            order: of the payload, by the name in its header; empty: portable.
        """
        if order:
            native = native_order(order)
            pages = payload.reshape(kind.group.num_layers, -1, native.page_bytes(kind.group))
            payload = native.unpack_layers(pages, kind.group).reshape(-1).view(np.uint8)
        begin = (number - self._first[kind.group.index]) * kind.chunk_tokens
        source = torch.from_numpy(payload).view(kind.dtype).view(kind.shape)
        target = self._buffers[kind.group.index]
        target[:, :, :, begin : begin + kind.chunk_tokens].copy_(source)

    def pour(self, cache: Any, num_chunks: int) -> None:
        """Make the leading chunks the past of an empty cache.

        Args:
            num_chunks: of all that were to come, where no kind has a window; else all of them.
        """
        num_tokens = num_chunks * self._kinds.chunk_tokens
        for kind, first, buffer in zip(self._kinds.each, self._first, self._buffers, strict=True):
            here = buffer[:, :, :, : num_tokens - first * kind.chunk_tokens]
            here = here[:, :, :, here.shape[3] - kind.kept(num_tokens) :].to(self._kinds.device)
            for row, number in enumerate(kind.layers):
                layer = cache.layers[number]
                keys, values = here[row, 0].unsqueeze(0), here[row, 1].unsqueeze(0)
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                if kind.group.window:
                    layer.cumulative_length = num_tokens


@dataclass(frozen=True)
class Taken:
    """What a cache held when a generation had ended: its own tensors, copied later.

    Args:
        kinds: of the model's layers.
        first: number of the first chunk that was computed.
        tokens: of the prompt and the answer whose KV there is.
        rows: of each kind the keys and values of its layers, each (1, H, T, D).
    """

    kinds: Kinds
    first: int
    tokens: Sequence[int]
    rows: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]

    @property
    def num_chunks(self) -> int:
        """Whole chunks of the tokens."""
        return len(self.tokens) // self.kinds.chunk_tokens

    def copied(self) -> Taken:
        """The same, in tensors of its own: whoever has the cache may change it."""
        rows = [[(k.clone(), v.clone()) for k, v in kind] for kind in self.rows]
        return Taken(self.kinds, self.first, self.tokens, rows)

    def get(self, kind: Kind, number: int, payload: Bytes) -> None:
        """Copy a chunk's object into a payload.

        Args:
            number: of the chunk, `first` or later.
            payload: (nbytes,) uint8.
        """
        size = kind.chunk_tokens
        begin = kind.kept(self.first * size) + (number - self.first) * size
        target = torch.from_numpy(payload).view(kind.dtype).view(kind.shape)
        for row, states in enumerate(self.rows[kind.group.index]):
            for state, tensor in enumerate(states):
                target[row, state].copy_(tensor[0, :, begin : begin + size])


def take(cache: Any, kinds: Kinds, first: int, tokens: Sequence[int]) -> Taken | None:
    """What a cache holds behind its first chunks, without copying it.

    Args:
        first: chunks that it was filled with; what follows has been recorded since.
        tokens: of the prompt and the answer, at least as many as the cache has.
    Returns:
        None if it does not hold what it should.
    """
    num_tokens = int(cache.get_seq_length())
    rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for kind in kinds.each:
        before = first * kind.chunk_tokens
        expected = kind.kept(before) + num_tokens - before
        shape = (1, kind.group.num_kv_heads, expected, kind.group.head_dim)
        layers = [(cache.layers[n].keys, cache.layers[n].values) for n in kind.layers]
        if any(one.shape != shape or one.dtype != kind.dtype for kv in layers for one in kv):
            return None
        rows.append(layers)
    if num_tokens > len(tokens):
        return None
    return Taken(kinds, first, list(tokens[:num_tokens]), rows)


def forget_past(cache: Any, kinds: Kinds) -> None:
    """Leave in a cache what the model alone would have left there: of windows the last one."""
    for kind in kinds.each:
        for number in kind.layers if kind.group.window else ():
            layer = cache.layers[number]
            layer.record_past = False
            if layer.is_initialized:
                layer.keys = layer.keys[:, :, -(kind.group.window - 1) :]
                layer.values = layer.values[:, :, -(kind.group.window - 1) :]
