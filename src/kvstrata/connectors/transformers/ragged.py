"""A cache of kept tokens, each head its own number of them, and the attention that reads it.

transformers looks attention up by a name in the model's configuration. Ours is registered under a
name of its own beside the others, so models that do not name it are what they were. Of each layer
the kept rows stand in front, filled up to the longest head's number, and what is computed follows;
the attention sees of a head's rows only those that it has. Keys are turned already, and new tokens
have the positions that they would have on the whole cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from kvstrata.errors import Incompatible, UsageError
from kvstrata.selection.kept import Kept

NAME = "kvstrata_kept"

MAX_MASK = 1 << 26
"""Elements of a mask that are there at once: of a long prompt queries go in several goes."""
OTHERS_OWN = ("softcap", "s_aux", "sliding_window", "position_bias")
"""What some models hand to their attention, and ours does not know."""

_answering: ContextVar[bool] = ContextVar("kvstrata_answering", default=False)


@contextmanager
def answering() -> Iterator[None]:
    """Inside, the model that is asked attends to kept tokens as is right."""
    token = _answering.set(True)
    try:
        yield
    finally:
        _answering.reset(token)


class KeptLayer(DynamicLayer):
    """One layer: kept tokens, and all that is computed behind their context.

    Args:
        keys, values: (1, H, C, D), C being the most that a head keeps; zeros fill up the others.
        counts: (H,) int64, how many each head keeps.
        tokens: of the context.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, tokens: int
    ) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.counts = counts
        self._tokens, self._filled = tokens, int(keys.shape[2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of any layer; another attention than ours would take fillings for tokens.

        Raises:
            UsageError: the model that asks has another attention.
        """
        if not _answering.get():
            raise UsageError(
                "a cache of kept tokens goes with no model but that it came from, while that is "
                "attached: give it to generate() again, or leave it"
            )
        keys, values = super().update(key_states, value_states)
        keys.kvstrata_kept = (self.counts, self._filled)  # for the attention, which is called next
        return keys, values

    def get_seq_length(self) -> int:
        return self._tokens + int(self.keys.shape[2]) - self._filled

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back that were computed; those of the context cannot be.

        Raises:
            UsageError: that is more than there are.
        """
        fewer = (
            tokens_to_remove - self.get_seq_length() if tokens_to_remove > 0 else tokens_to_remove
        )
        if fewer < 0:
            if -fewer > self.keys.shape[2] - self._filled:
                raise UsageError(
                    "of a context whose tokens were selected nothing can be taken back"
                )
            self.keys, self.values = self.keys[:, :, :fewer], self.values[:, :, :fewer]

    def reset(self) -> None:
        """Be as before anything was computed."""
        self.keys = self.keys[:, :, : self._filled]
        self.values = self.values[:, :, : self._filled]


def cache_of(kept: Kept, device: torch.device) -> Cache:
    """A cache that begins with kept tokens, for a model whose attention is ours."""
    dtype = getattr(torch, kept.dtype)
    keys, values = (
        torch.from_numpy(rows.view(_signed(rows.itemsize))).view(dtype)
        for rows in (kept.keys, kept.values)
    )
    layers = []
    for layer, of_heads in enumerate(kept.counts.tolist()):
        shape = (1, len(of_heads), max(of_heads), keys.shape[1])
        filled = keys.new_zeros(shape), values.new_zeros(shape)
        for head, count in enumerate(of_heads):
            own = kept.head(layer, head)
            for target, rows in zip(filled, (keys, values), strict=True):
                target[0, head, :count] = rows[own]
        counts = torch.tensor(of_heads, device=device)
        layers.append(
            KeptLayer(filled[0].to(device), filled[1].to(device), counts, kept.prompt_tokens)
        )
    return Cache(layers=layers)


def is_kept(cache: Any) -> bool:
    """Whether a cache begins with kept tokens."""
    return isinstance(cache, Cache) and any(type(one) is KeptLayer for one in cache.layers)


def _signed(itemsize: int) -> str:
    # torch has no unsigned words of every width; the bits are the same.
    return f"i{itemsize}"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention to the tokens that each head kept, and causally to those behind the context.

    Args:
        query: (1, Hq, n, D), of the newest tokens.
        key, value: (1, H, C + T, D) out of a `KeptLayer`, Hq a multiple of H.
        attention_mask: none; nothing is masked but by what heads keep, and causality.
    Returns:
        (1, n, Hq, D).
    Raises:
        Incompatible: the model asks for something that this attention does not have.
    """
    kept = getattr(key, "kvstrata_kept", None)
    if kept is None:
        raise Incompatible("it does not hand what its cache gives on to attention as it is")
    asked = [name for name in OTHERS_OWN if others.get(name) is not None]
    if asked or attention_mask is not None or dropout or query.shape[0] != 1:
        asked += ["attention_mask"] if attention_mask is not None else []
        raise Incompatible(f"its attention has {', '.join(asked) or 'dropout, or a batch'}")
    counts, filled = kept
    (_, heads, size, dim), (_, query_heads, new, _) = key.shape, query.shape
    # Each head of keys is one of a batch, and the queries that share it are its heads.
    grouped = query.reshape(heads, query_heads // heads, new, dim)
    keys, values = (
        one.reshape(heads, 1, size, dim).expand(-1, grouped.shape[1], -1, -1)
        for one in (key, value)
    )
    columns = torch.arange(size, device=key.device)
    own = columns < counts[:, None, None, None]
    at_once = max(1, MAX_MASK // (heads * size))
    parts = []
    for first in range(0, new, at_once):
        some = grouped[:, :, first : first + at_once]
        last = torch.arange(first, first + some.shape[2], device=key.device) + size - new
        behind = (columns >= filled) & (columns <= last[:, None])
        mask = own.logical_and(columns < filled).logical_or(behind)
        parts.append(
            scaled_dot_product_attention(some, keys, values, attn_mask=mask, scale=scaling)
        )
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return whole.reshape(1, query_heads, new, dim).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
