"""``kvstrata inspect``: what one stored object is, and whether it is whole."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption
from kvstrata.cli.plain import echo, json_text


def run(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Of its chunk, 64 hex digits: `kvstrata ls`.")
    ],
    tier: Annotated[
        str, typer.Option("--tier", metavar="TIER", help="Where it lies; host is host memory.")
    ] = "host",
    part: Annotated[
        int,
        typer.Option(
            "--part", min=0, max=(1 << 32) - 1, help="Which of the chunk's objects: its rank."
        ),
    ] = 0,
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Read one object where it lies, verify it, and print its header. Changes nothing.

    Exit status 1 if it is not there, or not whole.
    """
    with asking(config_file, settings, node, api) as client:
        found = client.inspect(tier, key, part)
    if as_json:
        typer.echo(json_text(found.model_dump(mode="json")))
    elif not found.nbytes:
        echo(f"{tier} does not have it")
    else:
        for name, value in found.header.items():
            shown = value if isinstance(value, str) else json.dumps(value)
            echo(f"{name:>16}  {shown}")
        echo(f"{'':>16}  {found.nbytes} bytes in {tier}: {found.problem or 'whole'}")
    if found.problem or not found.nbytes:
        raise typer.Exit(1)
