"""From a score per query head and query to one per token of each head of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from kvstrata.selection.evidence import Context
from kvstrata.selection.scores import Score

Queries = Literal["mean", "max", "shifting", "defensive"]
Groups = Literal["mean", "max"]
Heads = Literal["each", "layer", "retrieval"]

_SHIFT = 200.0  # how much the variance of attention over queries counts beside its mean
_RETRIEVAL_HEADS = 4


def _defensive(rows: torch.Tensor) -> torch.Tensor:
    worst = rows.amax(1)
    # A token that no query of ours looked at may still be asked for, so no risk is below a prior:
    # half the mean risk of its head. The other half is its own mean, which orders such tokens.
    return torch.maximum(worst, (worst.mean(-1, keepdim=True) + rows.mean(1)) / 2)


QUERIES: Mapping[Queries, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda rows: rows.mean(1),
    "max": lambda rows: rows.amax(1),
    "shifting": lambda rows: rows.mean(1) + _SHIFT * rows.var(1, correction=0),
    "defensive": _defensive,
}
"""(heads, R, T) to (heads, T)."""

_GROUPS: Mapping[Groups, Callable[..., torch.Tensor]] = {"mean": torch.mean, "max": torch.amax}


@dataclass(frozen=True)
class Aggregation:
    """How scores are brought together.

    Args:
        queries: over queries: their mean, their maximum (the worst case), the mean with what
            changes from query to query, or defensive: the worst case, never below a prior.
        groups: over the query heads that read one head of keys.
        heads: whether each head keeps tokens of its own, all of a layer the same, or all of a layer
            those that its retrieval heads look at.
        pool: tokens around one that lend it their score, an odd number: neighbours of what matters
            matter.
        runs: tokens that stay or go together.
        layers: so many layers, one behind the other, keep what the first of them does.
    """

    queries: Queries = "mean"
    groups: Groups = "mean"
    heads: Heads = "each"
    pool: int = 1
    runs: int = 1
    layers: int = 1

    def scores(self, context: Context, score: Score) -> list[torch.Tensor]:
        """For each layer (H, T) float32."""
        scores: list[torch.Tensor] = []
        for layer in range(len(context.layers)):
            if layer % self.layers:
                scores.append(scores[-1])
            else:
                scores.append(self._layer(context, score, layer))
        return scores

    def _layer(self, context: Context, score: Score, layer: int) -> torch.Tensor:
        tokens = QUERIES[self.queries](score.rows(context, layer))
        if self.heads == "retrieval" and tokens.shape[0] == context.retrieval.shape[1]:
            best = context.retrieval[layer].topk(min(_RETRIEVAL_HEADS, tokens.shape[0])).indices
            tokens = tokens[best.to(tokens.device)].mean(0).expand(context.heads, -1)
        elif tokens.shape[0] != context.heads:
            tokens = context.grouped(tokens, _GROUPS[self.groups])
        if self.heads == "layer":
            tokens = tokens.mean(0).expand(context.heads, -1)
        if self.pool > 1:
            pooled = torch.nn.functional.max_pool1d(
                tokens[None], self.pool, stride=1, padding=self.pool // 2
            )
            tokens = pooled[0]
        if self.runs > 1:
            tokens = _runs(tokens, self.runs)
        return tokens


def _runs(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Every token of a run gets the mean of the run; of equals the earlier ones are kept."""
    length = tokens.shape[-1]
    run = torch.arange(length, device=tokens.device) // size
    sums = tokens.new_zeros(tokens.shape[0], int(run[-1]) + 1).index_add_(1, run, tokens)
    return (sums / run.bincount()).index_select(1, run)
