"""``kvstrata quality --selection``: what selecting tokens costs answers, beside codecs."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvstrata.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from kvstrata.quality.selections.table import Table

QUICK_LENGTH, QUICK_FRACTIONS = 1024, (0.25,)


def measure_selection(
    folder: Path,
    name: str,
    *,
    quick: bool,
    kvpress: Path | None,
    json_file: Path | None,
    output: Path | None,
    tell: Callable[[str], None],
) -> None:
    """Measure, show and write it.

    Args:
        folder: of the model.
        name: of the model, for people.
        quick: one shorter context and one budget; kept only where ``json_file`` says.
        kvpress: an environment with kvpress; None takes the usual one where it is.
        json_file: where the table goes instead of the cache.
        output: folder for the Markdown and the plot.
        tell: hears what goes on.
    Raises:
        UsageError: a library is missing, or the model cannot be measured.
    """
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise UsageError(
                f"measuring selections needs {library}: pip install 'kvstrata[quality]'"
            )
    from kvstrata.cli.quality_results import deliver
    from kvstrata.quality.run import held_out_text
    from kvstrata.quality.selections import run, table
    from kvstrata.quality.selections.forms import markdown
    from kvstrata.quality.selections.plot import plot
    from kvstrata.quality.table import cache_folder
    from kvstrata.selection.presses import ENVIRONMENT, HOW

    began = time.monotonic()
    if kvpress is None and ENVIRONMENT.exists():
        kvpress = ENVIRONMENT
    if kvpress is None:
        tell(f"without kvpress's own presses: there is no {ENVIRONMENT}; {HOW}")
    measured = run.measure(
        folder,
        name,
        held_out_text(),
        kvpress=kvpress,
        length=QUICK_LENGTH if quick else run.LENGTH,
        count=1 if quick else run.WINDOWS,
        fractions=QUICK_FRACTIONS if quick else run.FRACTIONS,
        weights_cache=cache_folder() / "weights",
        tell=tell,
    )
    deliver(
        measured,
        _shown(measured),
        measured.left_out,
        save=table.save,
        target=json_file or (None if quick else table.path_for(measured.weights)),
        markdown=markdown,
        plot=plot,
        output=output,
        stem="selection",
        began=began,
        tell=tell,
    )


def _shown(table: Table) -> RichTable:
    """For a terminal; the frontier of bits and KL of the text is marked."""
    from kvstrata.cli.quality_results import rich_table
    from kvstrata.quality.selections.forms import HEADINGS, cells, ordered
    from kvstrata.quality.selections.table import frontier

    rows = ordered(table)
    best = frontier(rows)
    return rich_table(
        f"{table.model}: contexts: {table.windows} of {table.length} tokens, "
        f"{table.questions} questions on each",
        HEADINGS,
        [cells(row, rows) for row in rows],
        caption="bold: nothing else has fewer bits and no more divergence of the text",
        bold=[number for number, row in enumerate(rows) if row.label in best],
    )
