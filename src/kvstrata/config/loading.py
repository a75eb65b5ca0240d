"""How a configuration is made: a file, the environment and a dict go through one parser.

Nothing is ignored: an unknown key, a bad unit or a capacity larger than the machine is a
`ConfigError` with the key's path and what was expected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from kvstrata import units
from kvstrata.config import kinds
from kvstrata.config.environment import OTHER_VARIABLES, of_kubernetes
from kvstrata.config.files import read_file
from kvstrata.config.network import FLEET, PeerConfig
from kvstrata.config.options import (
    MAY_BE_MISSING,
    OPTIONS,
    PARTS,
    Config,
    default_secret_file,
    mandatory,
)
from kvstrata.config.owned import file_system_bytes
from kvstrata.config.tierparts import Room, check_fits
from kvstrata.errors import ConfigError, did_you_mean
from kvstrata.memory.machine import total_bytes


class _Given(NamedTuple):
    value: Any
    source: str  # file, environment or override
    where: str  # the same, exactly enough to find it


def load_config(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    memory_bytes: int | None = None,
    disk_bytes: Callable[[Path], int] = file_system_bytes,
) -> Config:
    """The configuration: overrides before the environment before the file before defaults.

    Args:
        file: TOML or YAML, by its ending; None: the one that KVSTRATA_CONFIG names, if any.
        environ: the process's own if None.
        overrides: nested (``{"host": {"capacity": "1GiB"}}``) or dotted (``"host.capacity"``).
        memory_bytes: all memory of the machine; measured if None.
        disk_bytes: size of the file system that holds a path, 0 if unknown.
    Raises:
        ConfigError: an unknown key, a value of the wrong kind, or more than the machine has.
    """
    environ = os.environ if environ is None else environ
    if file is None and "KVSTRATA_CONFIG" in environ:
        file = Path(environ["KVSTRATA_CONFIG"]).expanduser()
    given: dict[str, _Given] = {}
    if file is not None:
        given.update(_flatten(read_file(file), "file", f"file {file}"))
    given.update(_from_environment(environ))
    given.update(_flatten(overrides or {}, "override", "override"))

    values: dict[str, Any] = {"secret_file": default_secret_file(environ)}
    for path, (value, _, where) in given.items():
        if path in OPTIONS:
            try:
                values[path] = OPTIONS[path].kind.parse(value)
            except ValueError as error:
                expected = OPTIONS[path].kind.expected
                raise ConfigError(path, f"{error}; expected {expected} ({where})") from None

    parts: dict[str, Any] = {}
    for part, cls in PARTS.items():
        named = [path for path in given if path == part or path.startswith(f"{part}.")]
        if part in MAY_BE_MISSING and not named:
            continue
        prefix = f"{part}." if part else ""
        arguments = {
            item.name: values[prefix + item.name]
            for item in fields(cls)
            if prefix + item.name in values
        }
        for name in mandatory(cls):
            if name not in arguments:
                needed = " and ".join(prefix + other for other in mandatory(cls))
                raise ConfigError(
                    prefix + name,
                    f"missing, but {named[0]} is given ({given[named[0]].where}); the tier {part} "
                    f"needs {needed}; expected {OPTIONS[prefix + name].kind.expected}",
                )
        parts[part] = arguments if part == "" else cls(**arguments)
    sources = {path: item.source for path, item in given.items() if path in OPTIONS}
    tiers = tuple(parts.pop(name) for name in MAY_BE_MISSING if name in parts)
    config = Config(**parts.pop(""), **parts, tiers=tiers, sources=sources)
    _check_sums(config, memory_bytes, disk_bytes)
    return config


def _check_sums(
    config: Config, memory_bytes: int | None, disk_bytes: Callable[[Path], int]
) -> None:
    for part in config.tiers:
        if part.codec == "auto" and config.quality == "none":
            raise ConfigError(
                "quality",
                f"missing, but {part.name}.codec is auto; expected {kinds.BOUND.expected}",
            )
    leases = config.leases
    if leases.per_client > leases.total:
        total = units.format_fraction(leases.total)
        share = units.format_fraction(leases.per_client)
        raise ConfigError("leases.per_client", f"{share} is more than leases.total, {total}")
    if config.pins.per_tenant > config.pins.total:
        total = units.format_fraction(config.pins.total)
        share = units.format_fraction(config.pins.per_tenant)
        raise ConfigError("pins.per_tenant", f"{share} is more than pins.total, {total}")
    pool = config.host.capacity if isinstance(config.host.capacity, int) else 0

    def in_all() -> int:
        return total_bytes() if memory_bytes is None else memory_bytes

    if pool:
        check_fits("host.capacity", pool, in_all(), "memory this machine has")
    room = Room(lambda: max(0, in_all() - pool), disk_bytes)
    config.network.check()
    config.api.check()
    for part in config.tiers:
        part.check(room)
        if isinstance(part, PeerConfig):
            part.check_ways(config.network)
            if part.nodes == FLEET and config.fleet.registry is None:
                raise ConfigError("fleet.registry", "missing, but peer.nodes is fleet")


def _flatten(
    mapping: Mapping[Any, Any], source: str, where: str, prefix: str = ""
) -> dict[str, _Given]:
    """Dotted paths and their values; a part's own path stands for a part without any key."""
    flat: dict[str, _Given] = {}
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if path in OPTIONS:
            found = {path: _Given(value, source, where)}
        elif path in PARTS and path:
            if not isinstance(value, Mapping):
                keys = ", ".join(item.name for item in fields(PARTS[path]))
                # Perhaps the address that belongs into it, with a password: it is not repeated.
                raise ConfigError(path, f"this is not a table of {keys} ({where})")
            found = _flatten(value, source, where, f"{path}.") or {path: _Given({}, source, where)}
        else:
            raise ConfigError(path, f"unknown key{_hint(path)} ({where})")
        if twice := flat.keys() & found.keys():
            raise ConfigError(min(twice), f"given twice ({where})")
        flat.update(found)
    return flat


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, _Given]]:
    variables = {known.variable: known.path for known in OPTIONS.values()}
    for name, value in environ.items():
        if name in variables:
            where = f"environment variable {name}"
            yield variables[name], _Given(value, "environment", where)
        elif (
            name.startswith("KVSTRATA_")
            and name not in OTHER_VARIABLES
            and not of_kubernetes(name, value)
        ):
            known = [*variables, *OTHER_VARIABLES]
            # The prefix alone would make any two names look alike.
            hint = did_you_mean(name, known, prefix="KVSTRATA_")
            hint = hint or f"; expected one of {', '.join(known)}"
            raise ConfigError(name, f"unknown environment variable{hint}")


def _hint(path: str) -> str:
    """The option that was meant, by its name alone or by its spelling, or else all of them."""
    same_name = [option for option in OPTIONS if option.rpartition(".")[2] == path]
    if same_name:
        return f"; did you mean {' or '.join(same_name)}?"
    return did_you_mean(path, [*OPTIONS, *PARTS]) or f"; expected one of {', '.join(OPTIONS)}"
