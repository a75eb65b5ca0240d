"""``kvstrata api``: the HTTP API of a node that runs elsewhere."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from kvstrata.cli.asking import importable
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption, configured


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            metavar="ADDRESS",
            help="Such as 127.0.0.1:7780 or unix:/PATH; before the configuration's `api.listen`.",
        ),
    ] = None,
) -> None:
    """Run the HTTP API of a node in the foreground until SIGTERM or ctrl-C.

    It is a client of the node like any other, so it may be started and ended at any time; while
    no node answers, requests get a 503 that says so. `kvstrata serve --api` starts both. Prints
    "API on ..." once it listens; the log goes to stderr.

    Anybody who can reach the address may ask: on a machine with other users name a Unix socket, or
    tokens (`api.token_file`, KVSTRATA_API_TOKEN). On any address but loopback tokens are demanded.
    """
    given = [*(settings or []), *([f"api.listen={listen}"] if listen else [])]
    config = configured(config_file, given, node)
    with importable():
        from kvstrata.control.run import serve
    logging.basicConfig(
        level=config.log.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    serve(config, lambda url: typer.echo(f"API on {url}"))
