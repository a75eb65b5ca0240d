"""``kvstrata clear``: make a node forget what it holds, exactly and in every tier."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated, Any

import typer

from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption, configured, fail, join_or_exit
from kvstrata.errors import DeadlineExceeded, NodeUnavailable, TierUnavailable, UsageError


class TierName(str, Enum):
    """The tiers that can be named."""

    host = "host"
    memory = "memory"
    disk = "disk"


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    tiers: Annotated[
        list[TierName] | None,
        typer.Option("--tier", help="Only this tier; may be repeated. Default: all of them."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask. Needed where there is no terminal.")
    ] = False,
) -> None:
    """Forget everything that is stored, for all models and tenants, and say how much went.

    Engines go on: they miss, compute and store again. What a request is being loaded from right
    now stays in memory until that load ends, and can no longer be found. Exit status 1 if no node
    answers or a tier could not be cleared.
    """
    from kvstrata.units import approximate_size

    client = join_or_exit(configured(config_file, settings, node))
    try:
        stored = _stored(client.status())
        names = [tier.value for tier in tiers or ()] or list(stored)
        if missing := [name for name in names if name not in stored]:
            raise UsageError(f"this node has no {missing[0]} tier; it has {', '.join(stored)}")
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("clear asks first, and here is no terminal to ask on: give --yes")
            held = "; ".join(
                f"{name} {stored[name][0]} objects, {approximate_size(stored[name][1])}"
                for name in names
            )
            typer.confirm(f"Forget all of {held}?", abort=True)
        count = client.clear(tiers=names)
        typer.echo(f"forgot {count} objects ({', '.join(names)})")
    except TierUnavailable as error:
        fail(
            TierUnavailable(
                f"not cleared for good: {error}. Nothing of it is served now; clear again once "
                "the tier is back, or a restarted node may find it"
            )
        )
    except (NodeUnavailable, DeadlineExceeded) as error:
        fail(error)
    finally:
        client.close()


def _stored(state: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(objects, bytes) in each tier, by its name."""
    host = state["host"]
    held = {"host": (host["num_objects"], host["allocated_bytes"])}
    for tier in state["tiers"]:
        held[tier["name"]] = (tier["num_objects"], tier["used_bytes"])
    return held
