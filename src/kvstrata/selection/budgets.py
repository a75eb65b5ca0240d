"""How many tokens each layer and head may keep, of one budget for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from kvstrata.errors import UsageError
from kvstrata.selection.evidence import Context, Source, Window
from kvstrata.selection.measures import LAYERS, heterogeneity

_WINDOW = Window()


class Budget(Protocol):
    """How a budget is shared out."""

    def counts(
        self, context: Context, scores: list[torch.Tensor], total: int, least: int
    ) -> torch.Tensor:
        """(L, H) int64, ``total`` in all.

        Args:
            scores: for each layer (H, T) float32; what is kept in any case is infinite.
            total: rows, at most L * H * T.
            least: rows that every head gets, at most its share of ``total``.
        """
        ...


def shared_out(weights: torch.Tensor, total: int, least: int, most: int) -> torch.Tensor:
    """Whole numbers that are proportional to weights, within bounds, and ``total`` in all.

    Args:
        weights: (...) float, not negative.
        total: from ``least`` to ``most`` for each.
        least, most: of every number.
    Returns:
        int64 of the same shape.
    """
    flat = weights.double().reshape(-1).cpu().clamp_min(0)
    flat = flat + flat.sum().clamp_min(1e-30) * 1e-9  # nobody's weight is nothing
    want = total - least * len(flat)
    room = most - least
    share = torch.zeros_like(flat)
    open_ = torch.ones(len(flat), dtype=torch.bool)
    # Who reaches the top is closed; what is left is shared out among the rest.
    while open_.any():
        left = want - share[~open_].sum()
        share[open_] = left * flat[open_] / flat[open_].sum()
        over = open_ & (share > room)
        if not over.any():
            break
        share[over] = room
        open_ &= ~over
    whole = share.floor().long().clamp(0, room)
    behind = int(want - whole.sum())
    for place in (share - whole).sort(descending=True, stable=True).indices.tolist():
        if behind <= 0:
            break
        if whole[place] < room:
            whole[place] += 1
            behind -= 1
    # Rounding of the largest shares may leave a few more; the first with room take them.
    for place in range(len(whole)):
        more = min(behind, room - int(whole[place]))
        whole[place] += more
        behind -= more
    return (whole + least).reshape(weights.shape)


@dataclass(frozen=True)
class Even:
    """The same for all."""

    def counts(
        self, context: Context, scores: list[torch.Tensor], total: int, least: int
    ) -> torch.Tensor:
        weights = torch.ones(len(scores), context.heads)
        return shared_out(weights, total, least, context.length)


@dataclass(frozen=True)
class Pyramid:
    """Less from layer to layer, in even steps.

    Args:
        beta: the last layer gets one part in ``beta`` of the even budget.
    """

    beta: float = 20.0

    def counts(
        self, context: Context, scores: list[torch.Tensor], total: int, least: int
    ) -> torch.Tensor:
        last = 1 / self.beta
        weights = torch.linspace(2 - last, last, len(scores))[:, None]
        return shared_out(weights.expand(-1, context.heads), total, least, context.length)


@dataclass(frozen=True)
class Ranked:
    """By how many of the highest scores are whose.

    Args:
        across: among the heads of a layer, or of the whole model.
        unit: whether a head's number is its own, or that of all heads of its layer.
        aligned: heads are first brought in line, each with its tokens in order of their scores,
            so that what is ranked is places and no tokens.
        safeguard: of an even budget a head has this part in any case.
        normal: each head's scores are first divided by their sum.
    """

    across: Literal["layer", "model"] = "layer"
    unit: Literal["head", "layer"] = "head"
    aligned: bool = False
    safeguard: float = 0.2
    normal: bool = False

    def counts(
        self, context: Context, scores: list[torch.Tensor], total: int, least: int
    ) -> torch.Tensor:
        stacked = torch.stack(scores).double()
        layers, heads, length = stacked.shape
        if self.normal:
            finite = stacked.masked_fill(stacked.isinf(), 0)
            stacked = stacked / finite.sum(-1, keepdim=True).abs().clamp_min(1e-30)
        if self.aligned:
            stacked = stacked.sort(-1, descending=True).values.mean(1, keepdim=True)
        safe = max(least, int(self.safeguard * (total // (layers * heads))))
        own = torch.ones(layers) if self.across == "layer" else None
        if own is None:
            counts = _ranked(stacked, total // (heads if self.aligned else 1))
        else:
            parts = shared_out(own, total, 0, heads * length).tolist()
            counts = torch.cat([_ranked(stacked[i : i + 1], part) for i, part in enumerate(parts)])
        if self.unit == "layer" or self.aligned:
            counts = counts.double().mean(-1, keepdim=True).expand(layers, heads)
        if own is None:
            return shared_out(counts, total, safe, length)
        rows = [
            shared_out(row, part, min(safe, part // heads), length)
            for row, part in zip(counts, parts, strict=True)
        ]
        return torch.stack(rows)


def _ranked(scores: torch.Tensor, total: int) -> torch.Tensor:
    """(L, H) int64: how many of the ``total`` highest scores (L, H, T) are whose."""
    flat = scores.reshape(-1)
    best = flat.sort(descending=True, stable=True).indices[:total]
    marks = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
    marks[best] = 1
    return marks.reshape(scores.shape).sum(-1).cpu()


@dataclass(frozen=True)
class ByLayer:
    """By a measure of each layer's attention.

    Args:
        measure: one of `kvstrata.selection.measures.LAYERS`.
        of: whose attention.
        safeguard: of an even budget a head has this part in any case.
    """

    measure: str
    of: Source = _WINDOW
    safeguard: float = 0.2

    def counts(
        self, context: Context, scores: list[torch.Tensor], total: int, least: int
    ) -> torch.Tensor:
        even = total // (len(scores) * context.heads)
        rows = context.attention(self.of)
        measured = [LAYERS[self.measure](context, layer, of, even) for layer, of in enumerate(rows)]
        weights = torch.tensor(measured, dtype=torch.float64)[:, None].expand(-1, context.heads)
        safe = max(least, int(self.safeguard * even))
        return shared_out(weights, total, safe, context.length)


@dataclass(frozen=True)
class ByProfile:
    """By how much each head retrieves.

    Args:
        beta: of an even budget a head has 1 - 1 / beta in any case; the rest is shared out.
    """

    beta: float = 1.5

    def counts(
        self, context: Context, scores: list[torch.Tensor], total: int, least: int
    ) -> torch.Tensor:
        weights = _of_groups(context, context.retrieval)
        even = total // weights.numel()
        safe = max(least, int(even * (1 - 1 / self.beta)))
        return shared_out(weights, total, safe, context.length)


@dataclass(frozen=True)
class FullHeads:
    """A few heads keep everything, all others a little.

    Args:
        by: which heads: those that retrieve, or those whose output is unlike the other heads'.
        local: of an even budget, what the others get.
        of: by whose attention outputs are told apart.
    """

    by: Literal["retrieval", "heterogeneity"] = "retrieval"
    local: float = 0.25
    of: Source = _WINDOW

    def counts(
        self, context: Context, scores: list[torch.Tensor], total: int, least: int
    ) -> torch.Tensor:
        measured = context.retrieval if self.by == "retrieval" else heterogeneity(context, self.of)
        weights = _of_groups(context, measured)
        small = max(least, int(self.local * (total // weights.numel())))
        left = total - small * weights.numel()
        counts = torch.full((weights.numel(),), small)
        for place in weights.reshape(-1).sort(descending=True, stable=True).indices.tolist():
            more = min(left, context.length - small)
            counts[place] += more
            left -= more
        return counts.reshape(weights.shape)


@dataclass(frozen=True)
class FromTable:
    """By shares that somebody found out before, for each layer or each head."""

    def counts(
        self, context: Context, scores: list[torch.Tensor], total: int, least: int
    ) -> torch.Tensor:
        table, heads = context.table, context.heads
        if table is None or table.shape not in ((len(scores),), (len(scores), heads)):
            raise UsageError(
                f"this method takes a table of shares, ({len(scores)},) or "
                f"({len(scores)}, {heads}): there is {'none' if table is None else table.shape}"
            )
        weights = table if table.ndim == 2 else table[:, None].expand(-1, heads)
        return shared_out(weights, total, least, context.length)


def _of_groups(context: Context, heads: torch.Tensor) -> torch.Tensor:
    """(L, Hq) to (L, H): a head of keys is as important as the best that reads it."""
    return heads.reshape(heads.shape[0], context.heads, -1).amax(-1)
