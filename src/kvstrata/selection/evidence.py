"""What can be known of a context before anyone has asked anything: the attention it gets.

A source says whose attention: of the context's last tokens, of all of it, of tokens that may come
next, of the context when it is read once more. Of many queries the means (or peaks) of windows are
kept, so that the attention of a long context fits into memory; of few, every one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from kvstrata.errors import UsageError
from kvstrata.selection.observing import (
    Layers,
    cache_of,
    check,
    layers_of,
    observed,
    probabilities,
    read,
)
from kvstrata.selection.profiles import retrieval_profile

_PIECE_TOKENS = 256  # read at a time: attention of one layer stays small
_LEAD_TOKENS = 8  # of the piece before, so that a piece that is read again begins in its place


class Source(Protocol):
    """Whose attention; hashable, its fields are all it depends on."""

    def rows(self, context: Context) -> list[torch.Tensor]:
        """For each layer (Hq, R, T) float32: of each query, or window of queries, a row."""
        ...


@dataclass(frozen=True)
class Window:
    """The context's last tokens."""

    queries: int = 32

    def rows(self, context: Context) -> list[torch.Tensor]:
        start = max(0, context.length - self.queries)
        gathered = _Gathered(context, rows=self.queries)
        cache = context.cache(start)
        gathered.read(cache, context.tokens[start:], start)
        return gathered.rows()


@dataclass(frozen=True)
class Whole:
    """Every token of the context, as it was first read; the means of so many windows.

    Args:
        rows: how many.
        noise: Gumbel noise on the scores, and a temperature that rises from 1 to 2 on the way.
    """

    windows: int = 64
    noise: bool = False

    def rows(self, context: Context) -> list[torch.Tensor]:
        gathered = _Gathered(context, rows=self.windows, of=context.length, noise=self.noise)
        cache = context.cache(0)
        for start in range(0, context.length, _PIECE_TOKENS):
            gathered.read(cache, context.tokens[start : start + _PIECE_TOKENS], start)
        return gathered.rows()


@dataclass(frozen=True)
class Lookahead:
    """Tokens that the model itself puts behind the context, greedily."""

    queries: int = 8

    def rows(self, context: Context) -> list[torch.Tensor]:
        gathered = _Gathered(context, rows=self.queries)
        cache = context.cache(context.length - 1)
        token = read(context.model, cache, context.tokens[-1:], context.length - 1)
        for place in range(self.queries):
            token = gathered.read(cache, [token], context.length + place)
        return gathered.rows()


@dataclass(frozen=True)
class Ahead:
    """Tokens at the positions of an answer: what they are matters little, where they are much."""

    queries: int = 32

    def rows(self, context: Context) -> list[torch.Tensor]:
        gathered = _Gathered(context, rows=self.queries)
        words = context.tokens[-self.queries :]
        gathered.read(context.cache(context.length), words, context.length)
        return gathered.rows()


@dataclass(frozen=True)
class Again:
    """The whole context, read once more behind itself, piece by piece; peaks of so many windows."""

    windows: int = 64

    def rows(self, context: Context) -> list[torch.Tensor]:
        gathered = _Gathered(context, rows=self.windows, of=context.length, peaks=True)
        for start in range(0, context.length, _PIECE_TOKENS):
            cache = context.cache(context.length)
            lead = context.tokens[max(0, start - _LEAD_TOKENS) : start]
            if lead:
                read(context.model, cache, lead, context.length)
            piece = context.tokens[start : start + _PIECE_TOKENS]
            gathered.read(cache, piece, context.length + len(lead))
        return gathered.rows()


class _Gathered:
    """Attention over a context's tokens, gathered into rows while the model reads."""

    def __init__(
        self,
        context: Context,
        *,
        rows: int,
        of: int | None = None,
        peaks: bool = False,
        noise: bool = False,
    ) -> None:
        self._context = context
        self._of = of
        self._per_row = max(1, -(-(of or rows) // rows))
        self._peaks = peaks
        self._noise = torch.Generator().manual_seed(0) if noise else None
        self._seen = 0
        self._parts: dict[int, list[torch.Tensor]] = {}
        self._totals: dict[int, torch.Tensor] = {}

    def read(self, cache: Any, ids: Sequence[int], start: int) -> int:
        """Let the model read tokens and keep what they attend to."""
        with observed(self._context.model, self._hear):
            token = read(self._context.model, cache, ids, start)
        self._seen += len(ids)
        return token

    def rows(self) -> list[torch.Tensor]:
        """For each layer (Hq, R, T) float32."""
        layers = range(len(self._context.layers))
        if set(layers) != {*self._parts, *self._totals}:
            raise UsageError("the model's attention cannot be observed: it takes no function")
        if self._of is None:
            return [torch.cat(self._parts[layer], 1) for layer in layers]
        return [self._totals[layer] for layer in layers]

    def _hear(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        noise = None
        if self._noise is not None:
            temperature = 1 + self._seen / self._context.length
            scaling /= temperature
            uniform = torch.rand(queries.shape[1], keys.shape[1], generator=self._noise)
            gumbel = -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
            noise = (gumbel / temperature).to(keys.device)
        rows = probabilities(queries, keys, scaling, noise)[:, :, : self._context.length]
        if self._of is None:
            self._parts.setdefault(layer, []).append(rows)
        else:
            self._add(layer, rows, self._of)

    def _add(self, layer: int, rows: torch.Tensor, of: int) -> None:
        """Into the rows of their windows; what a piece cannot see yet gets nothing."""
        if layer not in self._totals:
            windows = -(-of // self._per_row)
            self._totals[layer] = rows.new_zeros(rows.shape[0], windows, self._context.length)
        window = (torch.arange(rows.shape[1], device=rows.device) + self._seen) // self._per_row
        for number in window.unique().tolist():
            mine = rows[:, window == number]
            there = self._totals[layer][:, number, : rows.shape[2]]
            if self._peaks:
                there.copy_(torch.maximum(there, mine.amax(1)))
            else:
                there.add_(mine.sum(1) / self._per_row)


@dataclass(eq=False)
class Context:
    """A context that tokens are selected of, with all that was found out about it so far.

    Args:
        model: of transformers, on one device; nobody else may run it meanwhile.
        layers: the context's keys and values, each (H, T, D), turned by their positions.
        tokens: the ids of the context.
        profile: (L, Hq), how much each head copies from what it has read, 0 to 1; measured when it
            is wanted and not given.
        table: (L,) or (L, H) shares of a budget, for methods that take them from a table.
    Raises:
        UsageError: tokens of such a model cannot be selected, or the parts do not fit.
    """

    model: Any
    layers: Layers
    tokens: Sequence[int]
    profile: torch.Tensor | None = None
    table: torch.Tensor | None = None
    _rows: dict[Source, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.model)
        if not self.tokens or any(keys.shape[1] != len(self.tokens) for keys, _ in self.layers):
            raise UsageError(f"the cache and a context of {len(self.tokens)} tokens do not match")

    @classmethod
    def of(cls, model: Any, cache: Any, tokens: Sequence[int], **more: Any) -> Context:
        """From a filled cache of transformers; see `Context` for the rest."""
        return cls(model, layers_of(cache, len(tokens)), tokens, **more)

    @property
    def length(self) -> int:
        """T."""
        return len(self.tokens)

    @property
    def heads(self) -> int:
        """H, heads of keys and values."""
        return int(self.layers[0][0].shape[0])

    @cached_property
    def retrieval(self) -> torch.Tensor:
        """(L, Hq) float32: the profile."""
        if self.profile is None:
            return retrieval_profile(self.model)
        return self.profile.float()

    def cache(self, tokens: int) -> Any:
        """A cache of the first tokens, to read on."""
        return cache_of(self.layers, tokens, self.model.dtype)

    def attention(self, source: Source) -> list[torch.Tensor]:
        """What a source says, computed once: for each layer (Hq, R, T) float32."""
        if source not in self._rows:
            self._rows[source] = source.rows(self)
        return self._rows[source]

    def keys(self, layer: int) -> torch.Tensor:
        """(H, T, D) float32."""
        return self.layers[layer][0].float()

    def values(self, layer: int) -> torch.Tensor:
        """(H, T, D) float32."""
        return self.layers[layer][1].float()

    def grouped(self, rows: torch.Tensor, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Of query heads (Hq, ...) to the heads whose keys they read, (H, ...)."""
        return reduce(rows.reshape(self.heads, -1, *rows.shape[1:]), 1)
