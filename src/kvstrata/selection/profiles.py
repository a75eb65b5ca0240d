"""How much each head of a model copies from what it has read: its profile, without any text.

Random tokens stand twice in a prompt. A head that retrieves looks, from a token of the second
half, at what followed that token in the first.
"""

from __future__ import annotations

from typing import Any

import torch

from kvstrata.selection.observing import cache_of, observed, probabilities, read

_TOKENS = 96
_SEED = 0


def retrieval_profile(model: Any) -> torch.Tensor:
    """Measure a model.

    Returns:
        (L, Hq) float32: the mean attention of a token to what followed its first occurrence.
    Source: the probe of induction and echo heads in RazorAttention, arXiv:2407.15891; differs: the
        echo (the token itself) does not count.
    """
    generator = torch.Generator().manual_seed(_SEED)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (_TOKENS,), generator=generator).tolist()
    found: dict[int, torch.Tensor] = {}

    def hear(layer: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        rows = probabilities(queries, keys, scaling)
        again = torch.arange(_TOKENS, 2 * _TOKENS - 1, device=rows.device)
        found[layer] = rows[:, again, again - _TOKENS + 1].mean(1)

    with observed(model, hear):
        read(model, cache_of([], 0, model.dtype), ids * 2, 0)
    return torch.stack([found[layer] for layer in sorted(found)]).cpu()
