"""A proof that keys can be turned: the same tokens, computed by the engine at two positions.

Attention sees how far tokens are from each other, not where they are, so all that differs between
the two is by what each key is turned. Keys of the one, turned, must be those of the other but for
rounding, and values must be the same, layer by layer. Whatever a model does with positions besides,
in its first layer or in its last, it fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kvstrata.blend import turn
from kvstrata.connectors.vllm.engine import Forward
from kvstrata.connectors.vllm.messages import Trial
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.connectors.vllm.proof import page_tensors
from kvstrata.connectors.vllm.rotary import Rotary
from kvstrata.connectors.vllm.trial import ROUNDING, blank, furthest, rows_of

NUM_TOKENS = 64
FURTHER = 1021
"""By how much further, if the model has so many positions: a prime, so that nothing repeats."""


class TurningProof:
    """Compares keys that are turned with those that the engine computes, in one worker.

    Args:
        pages: of the engine's one group.
        kv_caches: the engine's tensors by layer.
        rotary: what the keys are turned by.
        num_positions: that the engine serves.
    """

    def __init__(
        self,
        pages: Pages,
        kv_caches: Mapping[str, torch.Tensor],
        rotary: Sequence[Rotary],
        num_positions: int,
    ) -> None:
        self._pages, self._rotary = pages, rotary
        self._tensors = page_tensors(pages, kv_caches)
        self._further = min(FURTHER, num_positions - NUM_TOKENS)

    @torch.inference_mode()
    def fails(self, forward: Forward, trial: Trial) -> str:
        """Why keys must not be turned; empty: they may be.

        Blocks; takes as long as computing so many tokens twice. The blocks are restored.
        """
        blocks, dtype = list(trial.blocks), self._pages.group.dtype
        tokens, positions = trial.tokens[:NUM_TOKENS], range(NUM_TOKENS)
        if dtype not in ROUNDING:
            return f"KV in {dtype}"
        if self._further < 1:
            return f"no more than {NUM_TOKENS} positions"
        with blank(self._tensors, blocks):
            forward.compute(tokens, positions, blocks)
            near = [rows_of(self._pages, pages[blocks])[:, :, :NUM_TOKENS]
                    for pages in self._tensors]  # fmt: skip
            forward.compute(tokens, positions, blocks, told_further=self._further)
            far = [rows_of(self._pages, pages[blocks])[:, :, :NUM_TOKENS]
                   for pages in self._tensors]  # fmt: skip
        self._turn(near)
        for name, turned, wanted in zip(self._pages.layer_names, near, far, strict=True):
            off = furthest(turned, wanted)
            if not off <= ROUNDING[dtype]:
                return f"keys of layer {name} are turned wrongly, one by {off:.2g} of its length"
        return ""

    def _turn(self, layers: list[torch.Tensor]) -> None:
        """The keys of each layer's (S, H, T, D), in place."""
        for rotary in self._rotary:
            was = torch.from_numpy(rotary.rows(range(NUM_TOKENS)))
            now = torch.from_numpy(rotary.rows(range(self._further, self._further + NUM_TOKENS)))
            for number in rotary.layers:
                turn(layers[number][0], was, now, interleaved=rotary.interleaved)
