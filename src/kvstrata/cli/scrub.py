"""``kvstrata scrub``: verify all that a tier holds, now."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.following import follow
from kvstrata.cli.join import NodeOption


def run(
    tier: Annotated[
        str, typer.Argument(metavar="TIER", help="One of the node's own; host is host memory.")
    ],
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
) -> None:
    """Verify all that a tier holds, now and as fast as it reads, and say what is corrupt.

    What fails is taken out of service, so that it is computed and stored again. ctrl-C ends it, and
    what is done stays done. Exit status 1 if it did not come to its end, or something within it
    failed.
    """
    with asking(config_file, settings, node, api) as client:
        follow(client, client.scrub(tier), "objects")
