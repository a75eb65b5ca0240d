"""What ``kvstrata cluster`` has the nodes of a fleet do, each of which answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.cli.bounds import seconds
from kvstrata.cli.clearing import (
    NamespaceOption,
    OlderOption,
    SaltOption,
    TenantOption,
    age_ns,
    digest,
    owners,
)
from kvstrata.cli.config import ConfigFile, Settings, pairs, read_config
from kvstrata.cli.giving import give, in_turn
from kvstrata.cli.registered import ModelNamespace, TokensFile, keyed
from kvstrata.errors import UsageError
from kvstrata.units import parse_duration, parse_size

if TYPE_CHECKING:
    from kvstrata.config import Config
    from kvstrata.fleet.registry import Registry
    from kvstrata.wire import protocol as p

Nodes = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NAME", help="This node alone; may be repeated. Default: all."),
]
Seconds = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        callback=seconds(0),
        help="How long to wait for each answer.",
    ),
]
Owner = Annotated[
    str | None, typer.Option("--owner", metavar="HEX", help="Whose, by digest instead.")
]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Whose, by name.")]
Salt = Annotated[str, typer.Option("--salt", help="And the requests' cache_salt.")]


def clear(
    config_file: ConfigFile = None,
    settings: Settings = None,
    tiers: Annotated[
        list[str] | None,
        typer.Option(
            "--tier",
            metavar="NAME",
            help="Only this tier, of each node that has it; may be repeated. Default: all.",
        ),
    ] = None,
    tenant: TenantOption = None,
    salt: SaltOption = "",
    namespace: NamespaceOption = None,
    older_than: OlderOption = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask. Needed where there is no terminal.")
    ] = False,
) -> None:
    """Have every node forget everything that is stored, or what the options say.

    Done when each registered node has confirmed, or its registration has run out; a node that was
    away forgets it before it takes part again. Exit status 1 if one could not, or did not answer.
    """
    from kvstrata.secret import load_secrets
    from kvstrata.wire import protocol as p

    config = read_config(config_file, settings or [])
    secrets = [] if tenant is None else load_secrets(config.secret_file)
    whose, where, age = owners(secrets, tenant, salt), digest(namespace), age_ns(older_than)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("clear asks first, and here is no terminal to ask on: give --yes")
        typer.confirm("Forget that in the whole fleet?", abort=True)

    def requests(registry: Registry) -> list[p.Request]:
        before = 0 if age is None else registry.now_ns() - age
        return [p.Clear(0, None, list(tiers or ()), owner, where, before) for owner in whose]

    give(config, requests, timeout_s, only)


def pin(
    tokens: TokensFile,
    name: Annotated[str, typer.Option("--name", help="By which it is renewed, and ended.")],
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="TIME", help="For how long, such as 30min or 7d.")
    ] = "1d",
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="On whose quota. Default: the option `tenant`.")
    ] = None,
    salt: Annotated[str, typer.Option("--salt", help="The request's cache_salt.")] = "",
    namespace: ModelNamespace = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
) -> None:
    """Have every node keep the chunks of a prompt in its own tiers, those that come later, too.

    The same name again renews it. A node that was away keeps them when it is back.
    """
    from kvstrata.keys import owner_digest
    from kvstrata.secret import load_secrets
    from kvstrata.wire import protocol as p

    try:
        ttl_s = parse_duration(ttl)
    except ValueError as error:
        raise UsageError(f"--ttl: {error}") from error
    config = read_config(config_file, settings or [])
    secret = load_secrets(config.secret_file)[0]

    def requests(registry: Registry) -> list[p.Request]:
        prompt = keyed(registry.members(), secret, tokens, namespace, salt)
        whose = owner_digest(secret, config.tenant if tenant is None else tenant, salt)
        return [p.Pin(0, b"".join(prompt.keys), whose, name, ttl_s)]

    give(config, requests, timeout_s, only)


def unpin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the pin.")],
    tenant: Tenant = None,
    salt: Salt = "",
    owner: Owner = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
) -> None:
    """Have every node end a pin: its chunks may be evicted again. It can be repeated."""
    from kvstrata.wire import protocol as p

    config = read_config(config_file, settings or [])
    whose = _owners(config, tenant, salt, owner)
    give(config, lambda _: [p.Unpin(0, one, name) for one in whose], timeout_s, only)


def quota(
    tier: Annotated[
        str, typer.Argument(metavar="TIER", help="One of each node's own; host is host memory.")
    ],
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Such as 200GiB; none: no bound.")],
    tenant: Tenant = None,
    salt: Salt = "",
    owner: Owner = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
) -> None:
    """Have every node let a tenant have so many bytes in a tier of its own, and say what is there.

    It is a bound for each node, not a sum over them. A node that was away has it when it is back.
    """
    from kvstrata.wire import protocol as p

    try:
        nbytes = None if size == "none" else parse_size(size)
    except ValueError as error:
        raise UsageError(f"SIZE: {error}") from error
    config = read_config(config_file, settings or [])
    whose = _owners(config, tenant, salt, owner)
    give(config, lambda _: [p.Quota(0, one, tier, nbytes) for one in whose], timeout_s, only)


def reload(
    options: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE...", help="Such as disk.scrub_rate=64MiB/s."),
    ],
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
) -> None:
    """Have every node go by other values of options that may change while it runs.

    All its other options stay as each node has them, and its own file as it is: a node that starts
    anew reads that. What needs a restart is refused by its name, and then that node changes
    nothing. docs/api.md says what may change.
    """
    from kvstrata.wire import operating as o

    config = read_config(config_file, settings or [])
    given = pairs(options)
    give(config, lambda _: [o.Reload(0, dict(given))], timeout_s, only)


def flush(
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
) -> None:
    """Have every node write to its slower tiers what it has been given so far."""
    from kvstrata.wire import protocol as p

    give(read_config(config_file, settings or []), lambda _: [p.Flush(0)], timeout_s, only)


def drain(
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    end_: Annotated[
        bool, typer.Option("--end", help="End each node once it is drained, as for an upgrade.")
    ] = False,
    timeout_s: Seconds = 600.0,
) -> None:
    """Have the nodes take no more stores and write what is left, one node after the other.

    The next one begins when the one before has nothing left to write, and only if that went well.
    `undrain` has them take stores again.
    """
    from kvstrata.wire import operating as o

    in_turn(read_config(config_file, settings or []), o.Drain(0, end_), timeout_s, only)


def undrain(
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
) -> None:
    """Have nodes that are drained take stores again."""
    from kvstrata.wire import operating as o

    give(read_config(config_file, settings or []), lambda _: [o.Undrain(0)], timeout_s, only)


def scrub(
    tier: Annotated[str, typer.Argument(help="A tier that each node owns, such as disk.")],
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 3600.0,
) -> None:
    """Have every node verify all that one of its tiers holds, one node after the other."""
    from kvstrata.wire import operating as o

    in_turn(read_config(config_file, settings or []), o.Scrub(0, tier), timeout_s, only)


COMMANDS: dict[str, Callable[..., None]] = {
    "clear": clear,
    "pin": pin,
    "unpin": unpin,
    "quota": quota,
    "reload": reload,
    "flush": flush,
    "drain": drain,
    "undrain": undrain,
    "scrub": scrub,
}


def _owners(config: Config, tenant: str | None, salt: str, owner: str | None) -> list[bytes]:
    """Who is named, by each of the deployment's secrets. Raises `UsageError`."""
    from kvstrata.secret import load_secrets

    if owner is None:
        if tenant is None:
            raise UsageError("--tenant or --owner: missing")
        return owners(load_secrets(config.secret_file), tenant, salt)
    if tenant is not None or salt:
        raise UsageError("--owner stands for --tenant and --salt: give one or the other")
    try:
        found = bytes.fromhex(owner)
    except ValueError:
        found = b""
    if len(found) != 16:
        raise UsageError(f"the owner {owner!r} is no digest of 32 hex digits")
    return [found]
