"""How much each token of a context matters, before heads and queries are brought together.

A score is a small value: what it was given is all it depends on. Higher is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kvstrata.selection.evidence import Context, Source


class Score(Protocol):
    """A score per token."""

    def rows(self, context: Context, layer: int) -> torch.Tensor:
        """(heads, R, T) float32, heads those of queries or of keys; a row for each query, or one
        that stands for all.
        """
        ...


@dataclass(frozen=True)
class Attention:
    """The attention that a source pays to a token."""

    of: Source

    def rows(self, context: Context, layer: int) -> torch.Tensor:
        return context.attention(self.of)[layer]


@dataclass(frozen=True)
class AttentionTimesValue:
    """Attention times the norm of the token's value: what it adds to the output at most.

    Source: VATP, arXiv:2406.12335.
    """

    of: Source

    def rows(self, context: Context, layer: int) -> torch.Tensor:
        rows = context.attention(self.of)[layer]
        norms = context.values(layer).norm(dim=-1)
        return rows * norms.repeat_interleave(rows.shape[0] // context.heads, 0)[:, None]


@dataclass(frozen=True)
class KeyNorm:
    """Keys of a small norm draw attention. Source: arXiv:2406.11430."""

    def rows(self, context: Context, layer: int) -> torch.Tensor:
        return -context.keys(layer).norm(dim=-1)[:, None]


@dataclass(frozen=True)
class KeyDistance:
    """Keys unlike the mean key of their head. Source: KeyDiff, arXiv:2504.15364."""

    def rows(self, context: Context, layer: int) -> torch.Tensor:
        keys = torch.nn.functional.normalize(context.keys(layer), dim=-1)
        mean = torch.nn.functional.normalize(keys.mean(1, keepdim=True), dim=-1)
        return -(keys * mean).sum(-1)[:, None]


@dataclass(frozen=True)
class AttentionAndDistance:
    """Attention mixed with how unlike other keys a token's is, the more so the more alike the
    keys of the head are.

    Source: MixKV, arXiv:2510.20707.
    """

    of: Source

    def rows(self, context: Context, layer: int) -> torch.Tensor:
        attention = context.grouped(context.attention(self.of)[layer].mean(1), torch.mean)
        keys = torch.nn.functional.normalize(context.keys(layer), dim=-1)
        mean = keys.mean(1, keepdim=True)
        # The mean cosine of two keys of a head is the squared length of their mean.
        alike = mean.square().sum(-1).clamp(0, 1)
        distance = _spread(-(keys * mean).sum(-1))
        return ((1 - alike) * _spread(attention) + alike * distance)[:, None]


@dataclass(frozen=True)
class Recency:
    """The newer the better."""

    def rows(self, context: Context, layer: int) -> torch.Tensor:
        keys = context.layers[layer][0]
        places = torch.arange(context.length, dtype=torch.float32, device=keys.device)
        return places.expand(keys.shape[0], 1, -1)


@dataclass(frozen=True)
class Chance:
    """None at all: what anything has to beat."""

    seed: int = 0

    def rows(self, context: Context, layer: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + layer)
        keys = context.layers[layer][0]
        return torch.rand(keys.shape[0], 1, context.length, generator=generator).to(keys.device)


def _spread(scores: torch.Tensor) -> torch.Tensor:
    """Each head's scores between 0 and 1."""
    low = scores.amin(-1, keepdim=True)
    return (scores - low) / (scores.amax(-1, keepdim=True) - low).clamp_min(1e-12)
