"""``kvstrata quota``: how many bytes a tenant may have in a tier."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption
from kvstrata.cli.plain import echo
from kvstrata.errors import UsageError
from kvstrata.units import approximate_size, parse_size


def run(
    tier: Annotated[
        str, typer.Argument(metavar="TIER", help="One of the node's own; host is host memory.")
    ],
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Such as 200GiB; none: no bound.")],
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
    """Let a tenant have so many bytes in one of the node's own tiers, and say what it has there.

    Beyond that the tenant's own chunks go first, never another's; what is too much now goes at
    once. A quota outlives the node.
    """
    try:
        nbytes = None if size == "none" else parse_size(size)
    except ValueError as error:
        raise UsageError(f"SIZE: {error}") from error
    with asking(config_file, settings, node, api) as client:
        held = client.quota(tier, nbytes, owner, tenant, salt)
    echo(f"owner {held.owner} has {approximate_size(held.nbytes)} in {tier}")
