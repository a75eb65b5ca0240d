"""KL against bytes, codecs and selections together: whoever loses to a codec is grey."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from kvstrata.errors import UsageError
from kvstrata.quality.selections.table import CODEC, Row, Table, best_codec, frontier

_NAMED = ("random", "streaming", "snapkv")
"""Baselines that are named wherever they are."""
_BEST = 3  # of every budget are named, too


def plot(table: Table, path: Path) -> None:
    """Draw the table as the kind of file that the suffix says: on the left the text that follows,
    on the right the questions.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise UsageError("a plot needs matplotlib: pip install matplotlib") from error
    figure = figures.Figure(figsize=(13, 6), layout="constrained")
    sides = figure.subplots(1, 2)
    for axes, value, words in zip(
        sides, ("kl", "questions"), ("the text that follows", "the questions' answers"), strict=True
    ):
        _side(axes, table, value)
        axes.set_ylabel(f"mean KL(exact || smaller) of {words}, nats per token")
        axes.set_xlabel("bits per element of the context, positions counted (bfloat16: 16)")
    figure.suptitle(
        f"{table.model}, contexts of {table.length} tokens\ncodecs (blue), selections that beat "
        "every codec of no more bytes (green), and those that lose to one (grey)",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def _side(axes: Any, table: Table, value: str) -> None:
    rows = [row for row in table.rows if _of(row, value) > 0]
    best = frontier(rows, value)
    for row in rows:
        codec = row.kind == CODEC
        other = None if codec else best_codec(row, rows, value)
        loses = other is not None and _of(other, value) <= _of(row, value)
        color = "C0" if codec else "0.6" if loses else "C2"
        marker = "o" if codec else "x" if loses else "^"
        axes.plot(row.bits, _of(row, value), marker, color=color, markersize=5)
        if codec or row.label in best or row.name in _NAMED or row in _first(rows, row, value):
            axes.annotate(
                row.name.partition("@")[0],
                (row.bits, _of(row, value)),
                xytext=(-5, -3) if codec else (5, -3),
                ha="right" if codec else "left",
                textcoords="offset points",
                fontsize=6.5,
                color=color,
            )
    corners = sorted((row.bits, _of(row, value)) for row in rows if row.label in best)
    axes.plot([x for x, _ in corners], [y for _, y in corners], color="0.8", zorder=0)
    axes.margins(x=0.12)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.grid(visible=True, which="major", alpha=0.3)


def _of(row: Row, value: str) -> float:
    estimate: float = getattr(row, value).value
    return estimate


def _first(rows: list[Row], row: Row, value: str) -> list[Row]:
    """The best of the same budget."""
    same = [one for one in rows if one.kind != CODEC and one.fraction == row.fraction]
    return sorted(same, key=lambda one: _of(one, value))[:_BEST]
