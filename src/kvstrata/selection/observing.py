"""The attention of chosen queries over a context, read where the model itself computes it.

The model runs on its own weights with an attention function of ours, which is registered under a
name of its own (`transformers.AttentionInterface`) and hands each layer's queries and keys to an
observer before it goes on to the ordinary kernel. The answer of the model stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstrata.errors import UsageError

NAME = "kvstrata_observed"

Observer = Callable[[int, torch.Tensor, torch.Tensor, float], None]
"""Hears of a layer: its number, queries (Hq, n, D), keys (H, S, D) of all tokens so far, the new
ones last, and the factor of the scores.
"""

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (H, T, D), turned by their positions."""

_OBSERVER: ContextVar[Observer | None] = ContextVar("kvstrata_observer", default=None)
_UNLIKE = ("attn_logit_softcapping", "sliding_window", "attention_chunk_size")
_FULL = "full_attention"


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> Any:
    observer = _OBSERVER.get()
    if observer is not None:
        observer(int(module.layer_idx), query[0], key[0], scaling or query.shape[-1] ** -0.5)
    ordinary = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return ordinary(module, query, key, value, attention_mask, scaling=scaling, **rest)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def layers_of(cache: Any, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The KV of a context out of a transformers cache; what lies behind it is left out.

    Args:
        cache: a filled `DynamicCache` of one sequence.
        tokens: of the context.
    Raises:
        UsageError: some layer has no plain keys and values for every token.
    """
    layers = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[0] != 1:
            raise UsageError(f"layer {number} has no keys and values of one sequence")
        if keys.shape != values.shape or keys.shape[2] < tokens:
            raise UsageError(
                f"layer {number} keeps keys {tuple(keys.shape)} and values "
                f"{tuple(values.shape)}, not one of each for all {tokens} tokens"
            )
        layers.append((keys[0, :, :tokens], values[0, :, :tokens]))
    if len({keys.shape for keys, _ in layers}) != 1:
        raise UsageError("the layers' KV differ in shape")
    return layers


def check(model: Any) -> None:
    """Whether tokens can be selected for a model at all.

    Raises:
        UsageError: it has layers without full attention, or scores that are not plain ones.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [_FULL])
    if kinds != {_FULL}:
        raise UsageError(
            f"layers of {', '.join(sorted(kinds - {_FULL}))}: tokens are selected only where every "
            "layer has full attention"
        )
    for name in _UNLIKE:
        # Without types of layers the window is in force wherever it is set.
        if getattr(config, name, None) and not (
            name != "attn_logit_softcapping" and getattr(config, "layer_types", None)
        ):
            raise UsageError(f"the model has {name}: its tokens cannot be selected")
    if getattr(config, "kv_lora_rank", None):
        raise UsageError("the model keeps latents (MLA): its tokens cannot be selected")


@contextmanager
def observed(model: Any, observer: Observer) -> Iterator[None]:
    """Inside, every forward of this thread tells the observer; nobody else may run the model."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)
        model.set_attn_implementation(before)


def cache_of(layers: Layers, tokens: int, dtype: torch.dtype) -> DynamicCache:
    """A cache that holds the first tokens of a context; what is appended changes nothing else."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        if tokens:
            cache.update(
                keys[None, :, :tokens].to(dtype), values[None, :, :tokens].to(dtype), number
            )
    return cache


def read(model: Any, cache: DynamicCache, ids: Sequence[int], start: int) -> int:
    """Let the model read tokens behind what the cache holds.

    Args:
        ids: of the tokens; ``start`` is the position of the first one.
    Returns:
        The most likely token after them.
    """
    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor([list(ids)], device=model.device),
            past_key_values=cache,
            position_ids=torch.arange(start, start + len(ids), device=model.device)[None],
            use_cache=True,
            logits_to_keep=1,
        ).logits
    return int(logits[0, -1].argmax())


def probabilities(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of the newest tokens over all, causal.

    Args:
        queries: (Hq, n, D) of the last n tokens.
        keys: (H, S, D) of all.
        scaling: of the scores.
        noise: (n, S), added to the scores.
    Returns:
        (Hq, n, S) float32.
    """
    heads, count, dim = queries.shape
    grouped = queries.float().reshape(keys.shape[0], -1, dim)
    scores = (grouped @ keys.float().transpose(1, 2) * scaling).reshape(heads, count, -1)
    if noise is not None:
        scores = scores + noise
    if count > 1:
        size = scores.shape[-1]
        future = torch.ones(count, size, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(future.triu(size - count + 1), float("-inf"))
    return scores.softmax(-1)
