"""Methods of selection for tests, which choose by a seed, and what they keep for comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvstrata.connectors.transformers.wishes import Selector
from kvstrata.errors import UsageError
from kvstrata.layout import WORDS
from kvstrata.selection.kept import Kept, budget_rows


class Methods:
    """Stands in for `kvstrata.selection.methods`: chance by several seeds, and ones that fail.

    ``runs`` counts how often something was selected.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.last: Kept | None = None

    def named(self, name: Any) -> Selector:
        """As `kvstrata.connectors.transformers.wishes.selector_named`."""
        if name not in ("chance", "other", "all", "too much", "broken", "refusing", "changing"):
            raise UsageError(f"no method {name!r}")

        def select(model: Any, cache: Any, tokens: list[int], fraction: float) -> Kept:
            self.runs += 1
            if name == "broken":
                raise RuntimeError("on purpose")
            if name == "refusing":
                raise UsageError("not this one")
            if name == "changing":
                with torch.no_grad():
                    model.get_output_embeddings().weight.mul_(-1)
            assert cache.get_seq_length() == len(tokens)
            assert "generate" not in vars(model)
            some = fraction if name != "too much" else 1.0
            self.last = chosen(cache, len(tokens), some, seed=len(name))
            return self.last

        return Selector(f"{name} 1 context only", select)


def chosen(cache: Any, tokens: int, fraction: float, seed: int = 0) -> Kept:
    """Of each layer and head its own number of tokens, and others."""
    rng = np.random.default_rng(seed)
    layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    heads = layers[0][0].shape[0]
    total = budget_rows(len(layers) * heads, tokens, fraction)
    everywhere = rng.permutation(len(layers) * heads * tokens)[:total]
    there = np.zeros((len(layers), heads, tokens), np.bool_)
    there.reshape(-1)[everywhere] = True
    positions = [[torch.from_numpy(np.flatnonzero(head)) for head in layer] for layer in there]

    def rows(state: int) -> Any:
        each = [
            layer[state][head, kept]
            for layer, of_heads in zip(layers, positions, strict=True)
            for head, kept in enumerate(of_heads)
        ]
        flat = torch.cat(each).contiguous()
        words = flat.view(torch.uint8).numpy().view(WORDS[flat.element_size()])
        return words.reshape(len(flat), -1)

    dtype = str(layers[0][0].dtype).removeprefix("torch.")
    flat = np.concatenate([kept.numpy() for of_heads in positions for kept in of_heads])
    counts = there.sum(-1).astype(np.int32)
    return Kept(counts, flat.astype(np.int32), rows(0), rows(1), dtype, tokens)
