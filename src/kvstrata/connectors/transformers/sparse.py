"""A few tokens of many documents, chosen for one question, and computed anew over each other.

Documents that were computed apart are read by a question in two steps. First it reads the first and
the last tokens of all of them: there it learns what the others are about. What it then looks for in
each document decides which tokens are kept; only these are computed anew, and only these are
answered from.

Source: SamKV, arXiv:2508.11661; differs: one choice for all layers, by blocks, with one budget for
all documents together; and the question learns of the other documents by reading their ends, not by
a bias that is added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kvstrata.connectors.transformers.attention import scores_changed

FIRST, LAST = 4, 12
"""Tokens of each document that are always kept."""

BLOCK = 8
"""Tokens that are kept or left out together."""


def ends(documents: Sequence[range]) -> list[int]:
    """The first and last tokens of each document, ascending."""
    kept: list[int] = []
    for document in documents:
        if len(document) <= FIRST + LAST:
            kept += document
        else:
            kept += [*document[:FIRST], *document[-LAST:]]
    return kept


@torch.no_grad()
def looked_at(
    model: Any,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    head: int,
    documents: Sequence[range],
    question: Sequence[int],
) -> torch.Tensor:
    """How much a question looks at each token, once it knows what the documents are about.

    Args:
        model: of transformers.
        layers: of the whole prompt, keys and values (1, H, T, D), keys turned to their positions.
        head: tokens before the documents.
        documents: positions of each.
        question: tokens that will follow.
    Returns:
        (T,) float32: the mean weight of all layers, heads and tokens of the question.
    """
    length = layers[0][0].shape[2]
    known = torch.tensor([*range(head), *ends(documents)])
    hidden = torch.full((length,), True)
    hidden[known] = False
    total = torch.zeros(length)

    def change(_: int, scores: torch.Tensor) -> torch.Tensor:
        nonlocal total
        weights = scores[..., :length].softmax(dim=-1)
        total += weights.mean(dim=(0, 1, 2)).float().cpu()
        # What the question takes along to the next layer is from what it may know.
        seen = hidden.to(scores.device)
        masked = scores[..., :length].masked_fill(seen, float("-inf"))
        return torch.cat([masked, scores[..., length:]], dim=-1)

    cache = DynamicCache([(keys.clone(), values.clone()) for keys, values in layers])
    positions = torch.arange(length, length + len(question), device=model.device)[None]
    ids = torch.tensor([list(question)], device=model.device)
    with scores_changed(model, change):
        model.base_model(ids, past_key_values=cache, position_ids=positions, use_cache=True)
    return total / len(layers)


def kept_tokens(
    weights: torch.Tensor, head: int, documents: Sequence[range], ratio: float
) -> list[int]:
    """Positions of the tokens to keep, ascending, the head's not among them.

    The documents' ends are always kept, then the blocks that are looked at most.

    Args:
        weights: (T,), as of `looked_at`.
        head: tokens before the documents.
        documents: positions of each.
        ratio: of the documents' tokens, how many to keep, 0 to 1; ends count.
    """
    kept = set(ends(documents))
    budget = round(ratio * sum(map(len, documents)))
    blocks = [
        document[begin : begin + BLOCK]
        for document in documents
        for begin in range(0, len(document), BLOCK)
    ]
    blocks.sort(key=lambda block: -float(weights[block.start : block.stop].sum()))
    for block in blocks:
        more = kept.union(block)
        if len(more) > budget:
            break
        kept = more
    return sorted(kept)
