"""``kvstrata config``: print the effective configuration, and the options that name one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.cli.plain import json_text
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.config import Config

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="TOML or YAML; before KVSTRATA_CONFIG."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="One option; may be repeated."),
]


def read_config(file: Path | None, settings: list[str] | None) -> Config:
    """The configuration that a command's ``--config`` and ``--set`` options name.

    Raises:
        ConfigError: as `load_config`, or a setting that is no ``KEY=VALUE``.
    """
    from kvstrata.config import load_config

    return load_config(file, overrides=pairs(settings or [], "--set "))


def pairs(settings: Iterable[str], option: str = "") -> dict[str, str]:
    """What several ``KEY=VALUE`` say, the last of one key. Raises `ConfigError` for another."""
    given: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(key, f"expected {option}KEY=VALUE, such as host.capacity=8GiB")
        given[key] = value
    return given


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Print the effective configuration.

    It is TOML, with the source of each value, and can be saved and used as a configuration file.
    Exit status 2 and one line on stderr if the configuration is wrong.
    """
    from kvstrata.config import effective, host_capacity_bytes
    from kvstrata.memory.machine import available_bytes
    from kvstrata.units import approximate_size
    from kvstrata.wire.sockets import socket_path

    config = read_config(config_file, settings)
    socket, available = socket_path(config), available_bytes()
    capacity = host_capacity_bytes(config, available)
    if as_json:
        answer = {
            "config": config.shown(),
            "sources": dict(config.sources),
            "socket": str(socket),
            "host_capacity_bytes": capacity,
        }
        typer.echo(json_text(answer))
        return
    typer.echo(effective(config))
    typer.echo(f"# socket: {socket}")
    typer.echo(
        f"# pool, if the node started now: {approximate_size(capacity)}"
        f" of {approximate_size(available)} available"
    )
