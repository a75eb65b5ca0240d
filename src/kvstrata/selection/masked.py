"""Attention to the tokens that were kept and to none other, on a cache of full length.

Every layer and head leaves out what it dropped, so the answers are those of a cache that never had
it. Many questions on one context are so measured at once, in the tensors that models have anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstrata.errors import UsageError
from kvstrata.layout import Elements
from kvstrata.selection.kept import Kept

NAME = "kvstrata_masked"

_KEPT: ContextVar[torch.Tensor | None] = ContextVar("kvstrata_masked", default=None)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **rest: Any,
) -> Any:
    ordinary = ALL_ATTENTION_FUNCTIONS["sdpa"]
    kept = _KEPT.get()
    if kept is None:
        return ordinary(module, query, key, value, attention_mask, **rest)
    if attention_mask is None:
        raise UsageError("masked attention needs a mask of what is seen at all")
    seen = kept[module.layer_idx]
    outputs = []
    # Head by head, since each keeps other tokens; what is new is behind them.
    for head, queries in enumerate(query.chunk(key.shape[1], dim=1)):
        new = torch.arange(seen.shape[-1], key.shape[2], device=key.device)
        places = torch.cat([seen[head].nonzero()[:, 0], new])
        group = queries.shape[1]
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                queries,
                key[:, head : head + 1, places].expand(-1, group, -1, -1),
                value[:, head : head + 1, places].expand(-1, group, -1, -1),
                attn_mask=attention_mask[..., places],
                scale=rest.get("scaling"),
            )
        )
    return torch.cat(outputs, 1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def masked(model: Any, kept: npt.NDArray[np.bool_]) -> Iterator[None]:
    """Inside, the model sees of a context only what was kept; it needs masks of booleans.

    Args:
        model: of transformers, whose cache begins with the whole context.
        kept: (L, H, T).
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    token = _KEPT.set(torch.from_numpy(kept).to(model.device))
    try:
        yield
    finally:
        _KEPT.reset(token)
        model.set_attn_implementation(before)


def spread_out(kept: Kept) -> tuple[Elements, npt.NDArray[np.bool_]]:
    """The rows at their places, zeros between them.

    Returns:
        (L, 2, H, T, D) words, and which of them there are, (L, H, T).
    """
    layers, heads = kept.counts.shape
    dim = kept.keys.shape[1]
    kv = np.zeros((layers, 2, heads, kept.prompt_tokens, dim), kept.keys.dtype)
    there = np.zeros((layers, heads, kept.prompt_tokens), np.bool_)
    for layer, head in np.ndindex(layers, heads):
        rows = kept.head(layer, head)
        places = kept.positions[rows]
        kv[layer, 0, head, places] = kept.keys[rows]
        kv[layer, 1, head, places] = kept.values[rows]
        there[layer, head, places] = True
    return kv, there
