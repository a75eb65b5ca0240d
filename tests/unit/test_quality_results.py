"""The ending that all of ``kvstrata quality`` share: what is said, and which files are written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.cli.quality_results import deliver, rich_table


def written(kind: str) -> Callable[[str, Path], None]:
    """Writes a file that says what it is."""

    def write(table: str, path: Path) -> None:
        path.write_text(f"{kind} of {table}")

    return write


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("drawn", [True, False])
def test_what_is_asked_for_is_written_and_said(
    kept: bool, drawn: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails where a file is written that nobody asked for, or something left out is not told."""
    target, output = tmp_path / "table.json", tmp_path / "new" / "folder"
    said: list[str] = []
    deliver(
        "the table",
        rich_table("title", ["what", "bits"], [["raw", "16"]]),
        {"evolkv": "no table"},
        save=written("json"),
        target=target if kept else None,
        markdown=lambda table: f"page of {table}",
        plot=written("plot"),
        output=output if drawn else None,
        stem="selection",
        began=time.monotonic() - 61,
        tell=said.append,
    )
    page, drawing = output / "selection.md", output / "selection.png"
    there = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {
        **({target: "json of the table"} if kept else {}),
        **({page: "page of the table", drawing: "plot of the table"} if drawn else {}),
    }
    assert said[0] == "left out: evolkv: no table"
    assert said[1:-1] == [
        *([f"wrote {target}"] if kept else []),
        *([f"wrote {page} and {drawing}"] if drawn else []),
    ]
    words, seconds, unit = said[-1].rsplit(" ", 2)
    assert (words, unit) == ("took", "s")
    assert 61 <= int(seconds) < 120
    shown = capsys.readouterr().out
    assert shown.index("title") < shown.index("what") < shown.index("raw") < shown.index("16")


def test_columns_of_a_wide_table_are_whole_where_nobody_looks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails where a table goes to a file as narrow as a terminal, its cells cut."""
    cells = [f"column-{number:02}-{'x' * 20}" for number in range(6)]
    deliver(
        None,
        rich_table("title", cells, [cells], bold=[0]),
        {},
        save=lambda table, path: None,
        target=None,
        markdown=lambda table: "",
        plot=lambda table, path: None,
        output=None,
        stem="quality",
        began=time.monotonic(),
        tell=lambda line: None,
    )
    shown = capsys.readouterr().out
    assert all(shown.count(cell) == 2 for cell in cells)
