"""``kvstrata transcode``: store what a tier holds again, with another codec."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.following import follow
from kvstrata.cli.join import NodeOption


def run(
    tier: Annotated[str, typer.Argument(metavar="TIER", help="Whose objects are stored again.")],
    codec: Annotated[
        str, typer.Option("--codec", help="Its name. Default: as the tier is configured.")
    ] = "",
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
) -> None:
    """Store all that a tier of the node's own holds again, with another codec.

    What is stored so already stays. What a lossy codec may have been through gets no second one.
    ctrl-C ends it, and what is done stays done. Exit status 1 if it did not come to its end, or
    something within it failed.
    """
    with asking(config_file, settings, node, api) as client:
        follow(client, client.transcode(tier, codec), "chunks")
