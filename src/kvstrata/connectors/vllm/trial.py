"""A proof that tokens can be computed besides the engine's own steps: against one of these.

The beginning of the first long prompt that the engine computes is computed once more, in random
cuts and two goes, into the very blocks that hold it, which are blank meanwhile. What comes out must
be what the engine had put there, but for rounding: every layer's keys and values of every token.
The blocks are restored, whatever comes out, so a proof that fails harms nobody.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvstrata.connectors.vllm.engine import Forward
from kvstrata.connectors.vllm.messages import Trial
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.connectors.vllm.proof import page_tensors

#: what other cuts may change of a token's keys or values in a layer, by the length of these
ROUNDING = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
NUM_CUTS = 8


class Proof:
    """Compares what a forward computes with what the engine did, in one worker.

    Args:
        pages: of the engine's one group.
        kv_caches: the engine's tensors by layer.
    """

    def __init__(self, pages: Pages, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._pages = pages
        self._tensors = page_tensors(pages, kv_caches)

    @torch.inference_mode()
    def fails(self, forward: Forward, trial: Trial) -> str:
        """Why the forward must not be used; empty: it may be.

        Blocks; takes as long as computing the tokens. To be called when the engine's own forward
        has written these blocks, and before anybody else reads them.
        """
        blocks, dtype = list(trial.blocks), self._pages.group.dtype
        if dtype not in ROUNDING:
            return f"KV in {dtype}"
        saved = [pages[blocks].clone() for pages in self._tensors]
        try:
            for pages in self._tensors:
                pages[blocks] = 0
            _compute(forward, trial.tokens, blocks)
            for name, pages, was in zip(self._pages.layer_names, self._tensors, saved, strict=True):
                off = self._furthest(pages[blocks], was)
                if not off <= ROUNDING[dtype]:
                    return f"layer {name} comes out otherwise, a token by {off:.2g} of its length"
            return ""
        finally:
            for pages, was in zip(self._tensors, saved, strict=True):
                pages[blocks] = was

    def _furthest(self, pages: torch.Tensor, was: torch.Tensor) -> float:
        """How far the keys or values of a token are off, of all tokens the furthest.

        By their length, or, where they are shorter than most, by the usual one.

        Args:
            pages: (blocks, page_bytes) uint8, of one layer.
            was: the same, as it ought to be.
        """
        rows, wanted = self._rows(pages), self._rows(was)
        lengths = wanted.norm(dim=-1)
        usual = lengths.median(dim=-1, keepdim=True).values
        off = (rows - wanted).norm(dim=-1) / torch.maximum(lengths, usual).clamp_min(1e-30)
        # NaN is the furthest of all, and no comparison is true of it.
        return float(off.max())

    def _rows(self, pages: torch.Tensor) -> torch.Tensor:
        """A layer's keys and values: (states, tokens, all heads' numbers) float32."""
        group, order = self._pages.group, self._pages.order
        native = np.ascontiguousarray(pages.cpu().numpy()).reshape(-1, order.page_bytes(group))
        words = np.ascontiguousarray(order.unpack(native, group))
        signed = torch.from_numpy(words.view(f"i{group.item_bytes}"))
        return signed.view(getattr(torch, group.dtype)).float().transpose(1, 2).flatten(2)


def _compute(forward: Forward, tokens: Sequence[int], blocks: Sequence[int]) -> None:
    """All tokens, in cuts that are the same on all ranks."""
    chance, count = random.Random(0), len(tokens)
    cuts = chance.sample(range(1, count), min(NUM_CUTS, count - 1))
    cuts += [cut + 1 for cut in cuts[:2]]  # a run of one token
    middle = sorted(cuts)[len(cuts) // 2]
    for some in (range(middle), range(middle, count)):
        forward.compute([tokens[i] for i in some], list(some), blocks, cuts)
