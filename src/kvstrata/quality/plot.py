"""KL against bits, with the frontier drawn: what is dominated is grey."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from kvstrata.errors import UsageError
from kvstrata.quality.table import Table, frontier


def plot(table: Table, path: Path) -> None:
    """Draw the table, all lengths together, as the kind of file that the suffix says.

    A lossless codec has no place on a logarithmic axis; it lies at the bottom, as a triangle.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise UsageError("a plot needs matplotlib: pip install matplotlib") from error
    figure = figures.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    best = frontier(table.codecs)
    coded = [measured for measured in table.codecs if measured.at().kl_mean.value > 0]
    floor = min((measured.at().kl_mean.value for measured in coded), default=1e-3) / 3
    corners = []
    for measured in table.codecs:
        bits, kl = measured.at().bits, measured.at().kl_mean
        wins = measured.name in best
        style: dict[str, Any] = {"color": "C0" if wins else "0.65"}
        if measured in coded:
            # The lower end of an interval may be 0, which no logarithmic axis has.
            spread = [[kl.value - max(kl.low, floor)], [kl.high - kl.value]]
            axes.errorbar(
                bits,
                kl.value,
                yerr=[[max(0.0, end) for end in side] for side in spread],
                fmt="o" if wins else "x",
                capsize=2,
                **style,
            )
            corners += [(bits, kl.value)] if wins else []
        else:
            axes.plot(bits, floor, "v", **style)
        axes.annotate(
            measured.name.partition("@")[0] + ("" if measured in coded else " (KL 0)"),
            (bits, kl.value if measured in coded else floor),
            # What is dominated lies above and right of the frontier: so do its labels.
            xytext=(-5, -5) if wins else (5, 3),
            ha="right" if wins else "left",
            va="top" if wins else "bottom",
            textcoords="offset points",
            fontsize=8,
            **style,
        )
    corners.sort()
    axes.plot([x for x, _ in corners], [y for _, y in corners], color="C0", linewidth=1, zorder=0)
    axes.margins(x=0.2)
    axes.set_yscale("log")
    axes.set_xlabel("bits per element (bfloat16: 16)")
    axes.set_ylabel("mean KL(exact || decoded), nats per token")
    axes.set_title(f"{table.model}: codecs on the frontier, and dominated ones in grey")
    axes.grid(visible=True, which="major", alpha=0.3)
    figure.savefig(path, dpi=130)
