"""``kvstrata clear``: make a node forget what it holds, exactly and in every tier."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from kvstrata.cli.clearing import (
    NamespaceOption,
    OlderOption,
    SaltOption,
    TenantOption,
    age_ns,
    digest,
    owners,
)
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption, configured, fail, join_or_exit
from kvstrata.cli.plain import echo
from kvstrata.errors import (
    DeadlineExceeded,
    NodeUnavailable,
    ReadOnly,
    TierUnavailable,
    UsageError,
)

TIMEOUT_S = 60.0


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    tiers: Annotated[
        list[str] | None,
        typer.Option(
            "--tier",
            metavar="NAME",
            help="Only this tier, as `kvstrata status` names it; may be repeated. Default: all.",
        ),
    ] = None,
    tenant: TenantOption = None,
    salt: SaltOption = "",
    namespace: NamespaceOption = None,
    older_than: OlderOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask. Needed where there is no terminal.")
    ] = False,
) -> None:
    """Forget everything that is stored, or what fits all the options, and say how much went.

    A store that the node shares with others is cleared for all of them.

    Engines go on: they miss, compute and store again. What a request is being loaded from right
    now stays in memory until that load ends, and can no longer be found. Exit status 1 if no node
    answers or a tier could not be cleared.
    """
    from kvstrata.wire.operator import Operator

    client = join_or_exit(configured(config_file, settings, node))
    try:
        state = client.status()
        stored = _stored(state)
        names = tiers or list(stored)
        if missing := [name for name in names if name not in stored]:
            raise UsageError(f"this node has no {missing[0]} tier; it has {', '.join(stored)}")
        whose = owners(client.hello.secrets, tenant, salt)
        where, age = digest(namespace), age_ns(older_than)
        before = 0 if age is None else int(1e9 * state["now"]) - age  # by the clock of its dates
        given = {"tenant": tenant, "salt": salt, "namespace": namespace, "older than": older_than}
        only = ", ".join(f"{name} {value}" for name, value in given.items() if value)
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("clear asks first, and here is no terminal to ask on: give --yes")
            held = "; ".join(f"{name} {stored[name]}" for name in names)
            what = f"what is of {only} in" if only else "all of"
            typer.confirm(f"Forget {what} {held}?", abort=True)
        operator = Operator(client, TIMEOUT_S)
        count = sum(
            operator.clear(tiers=names, owner=owner, namespace=where, before_ns=before)
            for owner in whose
        )
        echo(f"forgot {count} objects ({', '.join(names)})")
    except ReadOnly as error:
        fail(error)
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


def _stored(state: Mapping[str, Any]) -> dict[str, str]:
    """What is in each tier that can be cleared, in words, by its name."""
    host = state["host"]
    held = {"host": _words(host["num_objects"], host["allocated_bytes"])}
    for tier in state["tiers"]:
        if not tier.get("shared"):
            held[tier["name"]] = _words(tier["num_objects"], tier["used_bytes"])
        elif tier.get("written", True):
            held[tier["name"]] = "what the whole fleet has there"
    return held


def _words(num_objects: int, num_bytes: int) -> str:
    from kvstrata.units import approximate_size

    return f"{num_objects} objects, {approximate_size(num_bytes)}"
