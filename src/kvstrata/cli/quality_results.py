"""How every ``kvstrata quality`` ends: its table is shown, kept, put on a page and plotted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table as RichTable

T = TypeVar("T")

_WIDTH = 240  # of the output where it is no terminal: enough for all columns


def rich_table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str | None = None,
    bold: Collection[int] = (),
) -> RichTable:
    """A table for a terminal: the first column to the left, all others to the right.

    Args:
        title: above it.
        headings: of its columns.
        rows: cells, as many as headings.
        caption: below it.
        bold: numbers of the rows that stand out.
    """
    from rich.table import Table as RichTable

    shown = RichTable(title=title, caption=caption)
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if number else "left")
    for number, cells in enumerate(rows):
        shown.add_row(*cells, style="bold" if number in bold else None)
    return shown


def deliver(
    table: T,
    shown: RichTable,
    left_out: Mapping[str, str],
    *,
    save: Callable[[T, Path], None],
    target: Path | None,
    markdown: Callable[[T], str],
    plot: Callable[[T, Path], None],
    output: Path | None,
    stem: str,
    began: float,
    tell: Callable[[str], None],
) -> None:
    """Print what was measured, write what was asked for, and say where it is.

    Args:
        table: that was measured.
        shown: the same for a terminal.
        left_out: why what was asked for is not there, by its name.
        save: writes the table to a file.
        target: that file; None: it is not kept.
        markdown: the table for a page.
        plot: draws it into a file.
        output: folder for page and plot; None: neither is made.
        stem: what they are called there.
        began: when, by `time.monotonic`.
        tell: hears what goes on.
    """
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH).print(shown)
    for name, why in left_out.items():
        tell(f"left out: {name}: {why}")
    if target is not None:
        save(table, target)
        tell(f"wrote {target}")
    if output is not None:
        page, drawing = output / f"{stem}.md", output / f"{stem}.png"
        output.mkdir(parents=True, exist_ok=True)
        page.write_text(markdown(table), encoding="utf-8")
        plot(table, drawing)
        tell(f"wrote {page} and {drawing}")
    tell(f"took {time.monotonic() - began:.0f} s")
