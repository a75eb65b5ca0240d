"""How far reused rows are from what they would be here, in the first layer where that shows.

A forward of the engine's own over all tokens of a blend that stops where that layer is about to
write its keys and values. What lies before it in the model is written by then and right: its first
layer's KV, which depends on each token alone.

Source: CacheBlend, arXiv:2405.16444.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch

from kvstrata.connectors.vllm.blends import Blending, Floats
from kvstrata.connectors.vllm.engine import Forward
from kvstrata.errors import Incompatible


class Check:
    """Computes as far as one layer, and compares that layer's rows.

    Args:
        forward: of the model.
        layer: the engine's attention layer whose rows are kept.
    """

    def __init__(self, forward: Forward, layer: Any) -> None:
        self._forward, self._layer = forward, layer

    def deviation(self, blending: Blending, positions: range) -> Floats:
        """Squared distance of this worker's keys and values from the reused ones, of each token.

        Args:
            blending: whose blocks hold all that lies before these positions.
            positions: no more than may be computed at once.
        Returns:
            (T,) float32; of no meaning where nothing is reused.
        """
        keys, values = self._computed(blending, positions)
        off = np.zeros(len(positions), np.float32)
        for heads, rows in blending.kept(positions):
            for there, new in zip(rows, (keys, values), strict=True):
                here = new[:, heads.start : heads.stop].transpose(0, 1).float().cpu().numpy()
                off += np.square(here - there).sum(axis=(0, 2))
        return off

    def _computed(self, blending: Blending, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer would write: twice (T, H, D)."""
        blend = blending.blend
        tokens = blend.tokens[positions.start : positions.stop]
        try:
            with _stopping(self._layer.impl):
                self._forward.compute(tokens, positions, blend.table, compiled=False)
        except _Stopped as stopped:
            return stopped.keys, stopped.values
        raise Incompatible("the engine's layers do not write their KV when it is computed")


class _Stopped(Exception):
    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__("a forward was stopped on purpose")
        self.keys, self.values = keys, values


@contextmanager
def _stopping(impl: Any) -> Iterator[None]:
    """Have a layer write nothing, and stop the forward instead."""

    def stop(layer: Any, keys: torch.Tensor, values: torch.Tensor, *_: Any) -> NoReturn:
        raise _Stopped(keys, values)

    impl.do_kv_cache_update = stop
    try:
        yield
    finally:
        del impl.do_kv_cache_update
