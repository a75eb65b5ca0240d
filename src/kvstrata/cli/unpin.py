"""``kvstrata unpin``: end a pin."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption


def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the pin.")],
    tenant: Annotated[str | None, typer.Option("--tenant", help="Whose, by name.")] = None,
    salt: Annotated[str, typer.Option("--salt", help="And the requests' cache_salt.")] = "",
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="HEX", help="Whose, by digest instead.")
    ] = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
) -> None:
    """End a pin: its chunks may be evicted again. `kvstrata pin` lists all pins with their owners.

    It can be repeated; exit status 1 if there is no such pin.
    """
    with asking(config_file, settings, node, api) as client:
        ended = client.unpin(name, owner, tenant, salt)
    if not ended.chunks:
        typer.echo("there is no such pin", err=True)
        raise typer.Exit(1)
    typer.echo(f"{ended.chunks} chunks are kept no more")
