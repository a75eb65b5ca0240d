"""KL against the share of tokens that is computed anew, one line for each plan."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from kvstrata.blend import PLANS
from kvstrata.errors import UsageError
from kvstrata.quality.blending.table import BlendTable

_FLOOR = 1e-4  # a logarithmic axis has no 0


def plot(table: BlendTable, path: Path) -> None:
    """Draw the table as the kind of file that the suffix says.

    The engine's plans are lines from none of the tokens on; what has but one ratio is a point.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise UsageError("a plot needs matplotlib: pip install matplotlib") from error
    figure = figures.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    start = table.row("none", 0.0)
    lines: dict[str, list[Any]] = {}
    for row in table.rows:
        name = row.plan if row.bound is None else f"{row.plan}, by a bound"
        lines.setdefault(name, []).append(row)
    for name, rows in lines.items():
        plan = rows[0].plan
        if plan in ("all", "none"):
            continue
        if plan in PLANS and rows[0].ratio:
            rows = [start, *rows]
        shares = [100 * row.computed for row in rows]
        values = [max(row.kl_mean.value, _FLOOR) for row in rows]
        spreads = [
            [max(0.0, v - max(r.kl_mean.low, _FLOOR)) for v, r in zip(values, rows, strict=True)],
            [max(0.0, r.kl_mean.high - v) for v, r in zip(values, rows, strict=True)],
        ]
        style: dict[str, Any] = {"color": "0.6"} if plan == "random" else {}
        many = len(rows) > 1
        axes.errorbar(
            shares,
            values,
            yerr=spreads,
            marker="o" if many else "x",
            linestyle="-" if many else "",
            capsize=2,
            label=name,
            **style,
        )
    axes.axhline(start.kl_mean.value, color="0.8", linewidth=1, zorder=0)
    axes.set_yscale("log")
    axes.set_xlabel("reused tokens computed anew, %")
    axes.set_ylabel("mean KL(exact || blended), nats per token")
    axes.set_title(f"{table.model}: the line is reuse with nothing computed anew")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
