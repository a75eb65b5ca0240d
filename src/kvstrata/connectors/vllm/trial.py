"""A proof that tokens can be computed besides the engine's own steps: against one of these.

The beginning of the first long prompt that the engine computes is computed once more, in random
cuts and two goes, into the very blocks that hold it, which are blank meanwhile. What comes out must
be what the engine had put there, but for rounding: every layer's keys and values of every token.
The blocks are restored, whatever comes out, so a proof that fails harms nobody.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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
        with blank(self._tensors, blocks) as saved:
            _compute(forward, trial.tokens, blocks)
            for name, pages, was in zip(self._pages.layer_names, self._tensors, saved, strict=True):
                rows, wanted = (rows_of(self._pages, one) for one in (pages[blocks], was))
                off = furthest(rows, wanted)
                if not off <= ROUNDING[dtype]:
                    return f"layer {name} comes out otherwise, a token by {off:.2g} of its length"
        return ""


@contextmanager
def blank(layers: Sequence[torch.Tensor], blocks: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Some blocks are blank meanwhile, and restored in the end, whatever comes.

    Args:
        layers: of each, (blocks, page_bytes) uint8.
        blocks: their numbers.
    Yields:
        What was in them, layer by layer.
    """
    saved = [pages[blocks].clone() for pages in layers]
    try:
        for pages in layers:
            pages[blocks] = 0
        yield saved
    finally:
        for pages, was in zip(layers, saved, strict=True):
            pages[blocks] = was


def rows_of(pages: Pages, native: torch.Tensor) -> torch.Tensor:
    """A layer's keys and values: (S, H, T, D) float32, on the CPU.

    Args:
        pages: of the layer.
        native: (blocks, page_bytes) uint8.
    """
    group, order = pages.group, pages.order
    pieces = np.ascontiguousarray(native.cpu().numpy()).reshape(-1, order.page_bytes(group))
    words = np.ascontiguousarray(order.unpack(pieces, group))
    signed = torch.from_numpy(words.view(f"i{group.item_bytes}"))
    return signed.view(getattr(torch, group.dtype)).float()


def furthest(rows: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far the keys or values of a token are off, of all tokens the furthest.

    By their length, or, where they are shorter than most, by the usual one.

    Args:
        rows: (S, H, T, D) float32.
        wanted: the same, as it ought to be.
    """
    found, right = (one.transpose(1, 2).flatten(2) for one in (rows, wanted))
    lengths = right.norm(dim=-1)
    usual = lengths.median(dim=-1, keepdim=True).values
    off = (found - right).norm(dim=-1) / torch.maximum(lengths, usual).clamp_min(1e-30)
    # NaN is the furthest of all, and no comparison is true of it.
    return float(off.max())


def _compute(forward: Forward, tokens: Sequence[int], blocks: Sequence[int]) -> None:
    """All tokens, in cuts that are the same on all ranks."""
    chance, count = random.Random(0), len(tokens)
    cuts = chance.sample(range(1, count), min(NUM_CUTS, count - 1))
    cuts += [cut + 1 for cut in cuts[:2]]  # a run of one token
    middle = sorted(cuts)[len(cuts) // 2]
    for some in (range(middle), range(middle, count)):
        forward.compute([tokens[i] for i in some], list(some), blocks, cuts)
