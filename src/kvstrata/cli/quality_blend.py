"""``kvstrata quality --blend``: what each plan of reuse at any position costs a model's answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from kvstrata.quality.blending.table import BlendTable

QUICK_WINDOWS, QUICK_RATIOS = 2, (0.15,)


def measure_blending(
    folder: Path,
    name: str,
    *,
    donor: str | None,
    quick: bool,
    json_file: Path | None,
    output: Path | None,
    tell: Callable[[str], None],
) -> None:
    """Measure, show and write it.

    Args:
        folder: of the model.
        name: of the model, for people.
        donor: another fine-tune of it: a folder, or the name of a packaged model.
        quick: a few windows and one ratio; kept only where ``json_file`` says.
        json_file: where the table goes instead of the cache.
        output: folder for the Markdown and the plot.
        tell: hears what goes on.
    """
    from kvstrata.cli.blend_ways import further
    from kvstrata.cli.models import model_folder
    from kvstrata.cli.quality_results import deliver
    from kvstrata.quality.blending import run, table
    from kvstrata.quality.blending.forms import markdown
    from kvstrata.quality.blending.plot import plot
    from kvstrata.quality.blending.ways import RATIOS, ways
    from kvstrata.quality.run import held_out_text
    from kvstrata.quality.table import cache_folder

    began = time.monotonic()
    donor_folder = model_folder(donor)[0] if donor else None
    measured = run.measure(
        folder,
        name,
        held_out_text(),
        measured=ways(QUICK_RATIOS if quick else RATIOS),
        more=lambda model: further(model, donor_folder),
        count=QUICK_WINDOWS if quick else run.WINDOWS,
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
        stem="blend",
        began=began,
        tell=tell,
    )


def _shown(table: BlendTable) -> RichTable:
    """For a terminal."""
    from kvstrata.cli.quality_results import rich_table
    from kvstrata.quality.blending.forms import HEADINGS, cells

    return rich_table(
        f"{table.model}: {table.documents} documents of {table.document_tokens} tokens in "
        f"another order, windows: {table.windows}",
        HEADINGS,
        map(cells, table.rows),
    )
