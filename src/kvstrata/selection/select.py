"""Choose the tokens of a context that are kept, with one method and one budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvstrata.errors import UsageError
from kvstrata.selection.evidence import Context
from kvstrata.selection.gathering import gathered
from kvstrata.selection.kept import Kept
from kvstrata.selection.methods import Method, method_named
from kvstrata.selection.presses import ENVIRONMENT, PREFIX, Presses


def select(
    model: Any,
    cache: Any,
    tokens: Sequence[int],
    method: str | Method,
    *,
    fraction: float | None = None,
    nbytes: int | None = None,
    table: torch.Tensor | None = None,
    kvpress: Path = ENVIRONMENT,
) -> Kept:
    """Select tokens of a context, without knowing what will be asked.

    The model reads a few tokens for that, or the context once more, as the method says; the cache
    stays as it is. Equal arguments give equal results on one machine.

    Args:
        model: of transformers; nobody else may run it meanwhile.
        cache: its filled `DynamicCache`, of one sequence, full attention in every layer.
        tokens: ids of the context, whose KV the cache begins with.
        method: a row of `kvstrata.selection.methods.METHODS`, or its name; or ``kvpress:`` and the
            name of a press, which reads the context by itself, in float32, and keeps about as much.
        fraction: of all rows (layers, heads, tokens) to keep, above 0, at most 1; or
        nbytes: at most so many bytes of payload, positions and counts included.
        table: (L,) or (L, H) shares, for methods that take them from a table.
        kvpress: the environment of presses; the model is then one of a local folder.
    Raises:
        UsageError: no such method, a budget of nothing, or a model with other kinds of layers.
    """
    context = Context.of(model, cache, tokens, table=table)
    rows = rows_of(context, fraction=fraction, nbytes=nbytes)
    if isinstance(method, str) and method.startswith(PREFIX):
        share = rows / (len(context.layers) * context.heads * context.length)
        with Presses(Path(model.config.name_or_path), kvpress) as presses:
            return presses.select(context, method.removeprefix(PREFIX), share)
    return of_context(context, method, rows)


def rows_of(context: Context, *, fraction: float | None = None, nbytes: int | None = None) -> int:
    """How many rows a budget is; see `select`.

    Raises:
        UsageError: not exactly one of both, or a budget that keeps nothing.
    """
    if (fraction is None) == (nbytes is None):
        raise UsageError("a selection takes a fraction or a number of bytes, one of both")
    heads = len(context.layers) * context.heads
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise UsageError(f"fraction {fraction}: above 0, at most 1")
        rows = int(fraction * heads * context.length)
    else:
        assert nbytes is not None
        keys = context.layers[0][0]
        rows = (nbytes - 4 * heads) // (4 + 2 * keys.shape[-1] * keys.element_size())
        rows = min(rows, heads * context.length)
    if rows < heads:
        raise UsageError(f"a budget of {max(rows, 0)} rows for {heads} heads: one each at least")
    return rows


def of_context(context: Context, method: str | Method, rows: int) -> Kept:
    """As `select`, of a context that may have been selected from before.

    Args:
        rows: of all layers and heads together; that many are kept.
    """
    if isinstance(method, str):
        method = method_named(method)
    counts, positions = chosen(context, method, rows)
    return gathered(context, counts, positions, method.merging)


def chosen(
    context: Context, method: Method, rows: int
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Counts (L, H) int64, and for each layer and head the positions, int64, ascending."""
    scores = [layer.clone() for layer in method.aggregation.scores(context, method.score)]
    heads = len(scores) * context.heads
    # What is kept in any case: never more than an even budget has.
    recent = min(method.recent, rows // heads)
    sinks = min(method.sinks, rows // heads - recent)
    for layer in scores:
        layer[:, :sinks] = float("inf")
        layer[:, context.length - recent :] = float("inf")
    counts = method.budget.counts(context, scores, rows, max(1, sinks + recent))
    positions = [
        [
            layer[head].sort(descending=True, stable=True).indices[: int(count)].sort().values
            for head, count in enumerate(row)
        ]
        for layer, row in zip(scores, counts.tolist(), strict=True)
    ]
    return counts, positions
