"""``kvstrata ls``: the chunks that a node holds."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption
from kvstrata.cli.plain import echo, json_text

PAGE = 1000


def run(
    tier: Annotated[
        str, typer.Option("--tier", metavar="TIER", help="Only what this one holds.")
    ] = "",
    most: Annotated[int, typer.Option("--most", min=1, help="How many are shown.")] = 100,
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, for programs.")
    ] = False,
) -> None:
    """List chunks in the node's own tiers, in the order of their keys: where each is, and of what.

    What the node does not know of a chunk is shown as -; it learns that when the chunk passes
    through host memory.
    """
    shown, after = 0, ""
    with asking(config_file, settings, node, api) as client:
        while shown < most:
            page = client.chunks(tier, after, min(PAGE, most - shown))
            for one in page.chunks:
                if as_json:
                    typer.echo(json_text(one.model_dump(mode="json"), None))
                else:
                    held = ", ".join(f"{name} {size}" for name, size in one.tiers.items())
                    position = f"{one.start}+{one.num_tokens}" if one.num_tokens else "-"
                    namespace = one.namespace[:8] or "-"
                    echo(f"{one.key}  {namespace:8}  {position:>12}  {held}")
            shown += len(page.chunks)
            if not (after := page.next):
                return
    echo("there are more: --most", err=True)
