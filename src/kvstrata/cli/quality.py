"""``kvstrata quality``: what each codec costs a model's answers, and what it gains."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from kvstrata.quality.table import Table

QUICK_LENGTHS, QUICK_WINDOWS = (1024,), 1


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The model's folder, or smollm2 or gemma3 for a packaged one."
        ),
    ],
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="NAME",
            help="Measure this codec and put its row into the table that is there; may be "
            "repeated. Default: all codecs, and a new table.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One window of 1,024 tokens: a look, not a result.")
    ] = False,
    only_speeds: Annotated[
        bool,
        typer.Option(
            "--speeds",
            help="Only measure the speeds again, for a table that was made on another machine.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the results here, not to the cache."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Write quality.md and quality.png here."),
    ] = None,
    blend: Annotated[
        bool,
        typer.Option(
            "--blend", help="Measure not codecs but plans of reusing documents at any position."
        ),
    ] = False,
    donor: Annotated[
        str | None,
        typer.Option(
            "--donor",
            metavar="MODEL",
            help="With --blend: another fine-tune of the model, whose lower layers are reused.",
        ),
    ] = None,
    selection: Annotated[
        bool,
        typer.Option(
            "--selection", help="Measure not codecs but methods that select tokens, beside them."
        ),
    ] = False,
    kvpress: Annotated[
        Path | None,
        typer.Option(
            "--kvpress",
            metavar="VENV",
            help="With --selection: an environment with kvpress, whose presses are measured, too. "
            "Default: .venv-kvpress, where that is.",
        ),
    ] = None,
) -> None:
    """Measure codecs on a real model: size, damage and speed, in one table.

    Each codec encodes and decodes the KV of real text chunk by chunk, and the model goes on from
    what came back. Needs transformers. The results go where a node looks for them, named after
    the model's weights; those of --quick go only where --json says.
    """
    from kvstrata.cli.models import model_folder
    from kvstrata.cli.quality_results import deliver
    from kvstrata.identity import weights_identity
    from kvstrata.quality import run as measuring
    from kvstrata.quality import table as results
    from kvstrata.quality.forms import markdown
    from kvstrata.quality.merging import merged
    from kvstrata.quality.plot import plot

    if output is not None and importlib.util.find_spec("matplotlib") is None:
        # Said at once, not after half an hour.
        raise UsageError("--output draws a plot, which needs matplotlib: pip install matplotlib")
    if only_speeds and (codec or quick):
        raise UsageError("--speeds goes with neither --codec nor --quick")
    if donor and not blend:
        raise UsageError("--donor goes with --blend alone")
    if blend and (only_speeds or codec):
        raise UsageError("--blend goes with neither --codec nor --speeds")
    if selection and (only_speeds or codec or blend):
        raise UsageError("--selection goes with none of --codec, --speeds and --blend")
    if kvpress is not None and not selection:
        raise UsageError("--kvpress goes with --selection alone")
    weights_cache = results.cache_folder() / "weights"

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    folder, name = model_folder(model)
    if blend:
        from kvstrata.cli.quality_blend import measure_blending

        measure_blending(
            folder,
            name,
            donor=donor,
            quick=quick,
            json_file=json_file,
            output=output,
            tell=tell,
        )
        return
    if selection:
        from kvstrata.cli.quality_selection import measure_selection

        measure_selection(
            folder,
            name,
            quick=quick,
            kvpress=kvpress,
            json_file=json_file,
            output=output,
            tell=tell,
        )
        return
    codecs = measuring.choose(codec or [], name)
    there = results.path_for(weights_identity(folder, weights_cache))
    kept = json_file is None and not quick
    began = time.monotonic()
    if only_speeds:
        if not there.exists():
            raise UsageError(f"there is no table {there}: kvstrata quality {model}")
        table = measuring.measure_speeds(
            folder, results.load(there), measuring.held_out_text(), tell=tell
        )
    else:
        onto = results.load(there) if codec and kept and there.exists() else None
        table = measuring.measure(
            folder,
            name,
            codecs,
            measuring.held_out_text(),
            lengths=QUICK_LENGTHS if quick else measuring.LENGTHS,
            count=QUICK_WINDOWS if quick else measuring.WINDOWS,
            weights_cache=weights_cache,
            onto=onto,
            tell=tell,
        )
        if onto is not None:
            # What is there by now: another run may have ended meanwhile.
            table = merged(results.load(there), table, list(measuring.everything(name)))
    deliver(
        table,
        _shown(table),
        table.left_out,
        save=results.save,
        target=there if kept else json_file,
        markdown=markdown,
        plot=plot,
        output=output,
        stem="quality",
        began=began,
        tell=tell,
    )


def _shown(table: Table) -> RichTable:
    """All lengths together, for a terminal; the frontier of bits and KL is marked."""
    from kvstrata.cli.quality_results import rich_table
    from kvstrata.quality.forms import HEADINGS, cells
    from kvstrata.quality.table import frontier

    lengths = ", ".join(map(str, table.lengths))
    best = frontier(table.codecs)
    return rich_table(
        f"{table.model}: contexts of {lengths} tokens, windows: {table.windows}",
        HEADINGS,
        map(cells, table.codecs),
        caption="bold: no other codec has fewer bits and no more divergence",
        bold=[number for number, row in enumerate(table.codecs) if row.name in best],
    )
