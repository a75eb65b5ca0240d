"""Attention of a model's own whose scores are seen, and changed, before they become weights.

It is one more function in transformers' registry, by a name of ours. Nothing of the library is
replaced, no other model attends otherwise, and this one does only within the context.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from kvstrata.errors import Incompatible

NAME = "kvstrata_scores"

Change = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer's number and its scores (B, H, Q, T), scaled and masked, to the scores that count.
H is query heads; a masked score is minus infinity, and must stay so."""

_CHANGES: dict[int, Change] = {}
"""By the identity of a model's configuration, which its layers know it by."""
_LOCK = threading.Lock()


@contextmanager
def scores_changed(model: Any, change: Change) -> Iterator[None]:
    """Let a model attend by changed scores; afterwards it attends as before.

    Not for two threads with one model.

    Args:
        model: of transformers.
        change: of the scores.
    Raises:
        Incompatible: the model does not take its attention from the registry, or its scores are
            changed already.
    """
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    with _LOCK:
        if id(config) in _CHANGES:
            raise Incompatible("the scores of this model's attention are changed already")
        _CHANGES[id(config)] = change
    try:
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        model.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:
            raise Incompatible("the model's attention cannot be replaced by one of the registry")
        yield
    finally:
        with _LOCK:
            del _CHANGES[id(config)]
        model.set_attn_implementation(before)


def are_changed(model: Any) -> bool:
    """Whether a model attends by changed scores just now: what it computes is for no one else."""
    return id(model.config.get_text_config(decoder=True)) in _CHANGES


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention in float32; the signature is transformers'.

    Args:
        query, key, value: (B, heads, tokens, D).
        attention_mask: (B, 1, Q, T or longer), to add, or whether to see; None: all is seen.
    """
    if more.get("s_aux") is not None:
        raise Incompatible("attention with learnt sinks is not changed")
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query.float(), key.float().transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        mask = attention_mask[..., : scores.shape[-1]]
        if mask.dtype != torch.bool:
            # What is added is the least number there is, or nothing.
            mask = mask > torch.finfo(mask.dtype).min / 2
        scores = scores.masked_fill(~mask, float("-inf"))
    scores = _CHANGES[id(module.config)](module.layer_idx, scores)
    weights = torch.nn.functional.softmax(scores, dim=-1)
    mixed = torch.matmul(weights.to(value.dtype), value)
    return mixed.transpose(1, 2).contiguous(), None
