"""How far reused rows are from what they would be here, in the first layer where that shows.

A forward of the engine's own over all tokens of a blend that stops where that layer is about to
write its keys and values. What lies before it in the model is written by then and right: its first
layer's KV, which depends on each token alone.

Source: CacheBlend, arXiv:2405.16444.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from kvstrata.connectors.vllm.blends import Floats
from kvstrata.connectors.vllm.engine import Forward
from kvstrata.connectors.vllm.messages import Blend
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.connectors.vllm.proof import page_tensors
from kvstrata.connectors.vllm.trial import rows_of
from kvstrata.errors import Incompatible


class Check:
    """Computes as far as one layer, and compares that layer's rows with those in the blocks.

    Args:
        forward: of the model.
        pages: of the engine's one group.
        kv_caches: the engine's tensors by layer.
        layers: the engine's attention layers, by name.
    """

    def __init__(
        self,
        forward: Forward,
        pages: Pages,
        kv_caches: Mapping[str, torch.Tensor],
        layers: Mapping[str, Any],
    ) -> None:
        # What the layer before it holds depends on its own token alone.
        number = min(1, len(pages.layer_names) - 1)
        self._forward, self._pages = forward, pages
        self._layer = layers[pages.layer_names[number]]
        self._blocks = page_tensors(pages, kv_caches)[number]

    @torch.inference_mode()
    def deviation(self, blend: Blend, positions: range) -> Floats:
        """Squared distance of this worker's keys and values from the reused ones, of each token.

        Args:
            blend: whose blocks hold all that lies before these positions, and the reused rows.
            positions: no more than may be computed at once.
        Returns:
            (T,) float32; of no meaning where nothing is reused.
        """
        here = self._computed(blend, positions)
        size = self._pages.block_tokens
        first, last = positions.start // size, -(-positions.stop // size)
        there = rows_of(self._pages, self._blocks[blend.table[first:last]])
        there = there[:, :, positions.start - first * size :][:, :, : len(positions)]
        off = (here.transpose(1, 2).float().cpu() - there).square().sum(dim=(0, 1, 3))
        found: Floats = off.numpy()
        return found

    def _computed(self, blend: Blend, positions: range) -> torch.Tensor:
        """What the layer would write: (S, T, H, D)."""
        tokens = blend.tokens[positions.start : positions.stop]
        try:
            with _stopping(self._layer.impl):
                self._forward.compute(tokens, positions, blend.table, compiled=False)
        except _Stopped as stopped:
            return stopped.rows
        raise Incompatible("the engine's layers do not write their KV when it is computed")


class _Stopped(Exception):
    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__("a forward was stopped on purpose")
        self.rows = rows


@contextmanager
def _stopping(impl: Any) -> Iterator[None]:
    """Have a layer write nothing, and stop the forward instead."""

    def stop(layer: Any, keys: torch.Tensor, values: torch.Tensor, *_: Any) -> NoReturn:
        raise _Stopped(torch.stack([keys, values]))

    impl.do_kv_cache_update = stop
    try:
        yield
    finally:
        del impl.do_kv_cache_update
