"""How much of a budget a layer, or a head, deserves, by what is seen of its attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kvstrata.selection.evidence import Context, Source

LayerMeasure = Callable[[Context, int, torch.Tensor, int], float]
"""Of a context, a layer, its rows (Hq, R, T) and the tokens a head would get of an even budget:
the share, not negative.
"""

_COVERED = 0.9
_SPARSE = 0.01
_TAU_SPACE, _TAU_TIME = 1.6, 0.4
_EPSILON = 1e-12


def entropy(context: Context, layer: int, rows: torch.Tensor, tokens: int) -> float:
    """How widely attention is spread, in nats. Source: MEDA, arXiv:2502.17599."""
    mean = _distribution(rows.mean(1))
    return float(-(mean * mean.clamp_min(_EPSILON).log()).sum(-1).mean())


def preference(context: Context, layer: int, rows: torch.Tensor, tokens: int) -> float:
    """Spread over tokens, and how it shifts from query to query. Source: CAKE, arXiv:2503.12491."""
    space = entropy(context, layer, rows, tokens)
    time = float(rows.var(1, correction=0).sum(-1).mean())
    return float(space ** (1 / _TAU_SPACE) * max(time, _EPSILON) ** (1 / _TAU_TIME))


def coverage(context: Context, layer: int, rows: torch.Tensor, tokens: int) -> float:
    """Tokens that hold nine tenths of a head's attention. Source: ZigZagKV, arXiv:2412.09036."""
    largest = _distribution(rows.mean(1)).sort(-1, descending=True).values
    return float((largest.cumsum(-1) < _COVERED).sum(-1).float().add(1).mean())


def density(context: Context, layer: int, rows: torch.Tensor, tokens: int) -> float:
    """Share of tokens with a hundredth of the row's maximum, or more. Source: VL-Cache,
    arXiv:2410.23317.
    """
    return float((rows >= _SPARSE * rows.amax(-1, keepdim=True)).float().mean())


def evenness(context: Context, layer: int, rows: torch.Tensor, tokens: int) -> float:
    """Smaller the more tokens differ in the attention they get. Source: D2O, arXiv:2406.13035."""
    mean = _distribution(rows.mean(1)) * rows.shape[-1]
    # The deviation in units of the mean: 0 where all tokens get the same.
    return float(1 / (1 + mean.std(-1, correction=0).mean()))


def loss(context: Context, layer: int, rows: torch.Tensor, tokens: int) -> float:
    """What the layer's attention loses of its output with an even budget, relative to its size.

    Source: the layers' eviction error in CompressKV, arXiv:2508.02401.
    """
    mean = rows.mean(1)
    values = context.values(layer).repeat_interleave(rows.shape[0] // context.heads, 0)
    best = mean.topk(min(max(tokens, 1), mean.shape[-1]), -1).indices
    kept = torch.zeros_like(mean).scatter(-1, best, mean.gather(-1, best))
    exact = (_distribution(mean)[:, None] @ values)[:, 0]
    less = (_distribution(kept)[:, None] @ values)[:, 0]
    return float((exact - less).norm() / exact.norm().clamp_min(_EPSILON))


LAYERS: Mapping[str, LayerMeasure] = {
    "entropy": entropy,
    "preference": preference,
    "coverage": coverage,
    "density": density,
    "evenness": evenness,
    "loss": loss,
}


def heterogeneity(context: Context, source: Source) -> torch.Tensor:
    """(L, Hq): how far the output of each head is from its layer's centre, relative to its size.

    Source: Task-KV, arXiv:2501.15113; differs: before the output projection.
    """
    distances = []
    for layer, rows in enumerate(context.attention(source)):
        values = context.values(layer).repeat_interleave(rows.shape[0] // context.heads, 0)
        outputs = (rows.mean(1)[:, None] @ values)[:, 0]
        outputs = torch.nn.functional.normalize(outputs, dim=-1)
        distances.append((outputs - outputs.mean(0)).norm(dim=-1))
    return torch.stack(distances).cpu()


def _distribution(attention: torch.Tensor) -> torch.Tensor:
    return attention / attention.sum(-1, keepdim=True).clamp_min(_EPSILON)
