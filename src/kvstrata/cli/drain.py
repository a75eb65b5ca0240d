"""``kvstrata drain``: a node takes no more stores, before it ends or to be left alone."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.following import follow
from kvstrata.cli.join import NodeOption
from kvstrata.errors import UsageError


def run(
    end: Annotated[
        bool, typer.Option("--end", help="End the node once all is written, as a signal does.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Let it take stores again.")] = False,
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
) -> None:
    """Have a node take no new stores, and wait until all that it has is written behind.

    Engines go on reading. ctrl-C stops the waiting, and the node still takes no stores until
    `kvstrata drain --undo`. Exit status 1 if it did not come to its end.
    """
    if end and undo:
        raise UsageError("--end and --undo: one of them")
    with asking(config_file, settings, node, api) as client:
        if undo:
            was = client.undrain().was_drained
            typer.echo("it takes stores again" if was else "it was not drained")
        else:
            follow(client, client.drain(end), "bytes")
