"""One frozen, strict configuration: a file, the environment and a dict go through one parser.

The dataclasses below are the only list of options; the parser, the printed configuration and
`docs/configuration.md` are derived from them. Nothing is ignored: an unknown key, a bad unit or a
capacity larger than the machine is a `ConfigError` with the key's path and what was expected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from kvstrata import units
from kvstrata.config import kinds
from kvstrata.config.api import ApiConfig
from kvstrata.config.environment import OTHER_VARIABLES, of_kubernetes
from kvstrata.config.files import read_file
from kvstrata.config.fleet import FleetConfig
from kvstrata.config.network import FLEET, NetworkConfig, PeerConfig
from kvstrata.config.owned import file_system_bytes
from kvstrata.config.parts import (
    DeadlineConfig,
    HostConfig,
    LeaseConfig,
    PinConfig,
    about,
    option,
)
from kvstrata.config.tierparts import Room, TierPart, check_fits
from kvstrata.config.tiers import TIERS
from kvstrata.config.tracing import TracingConfig
from kvstrata.errors import ConfigError, did_you_mean
from kvstrata.memory.machine import total_bytes

LOG_LEVELS = ("debug", "info", "warning", "error")


def default_secret_file(environ: Mapping[str, str]) -> Path:
    """``$XDG_CONFIG_HOME/kvstrata/secret``, or below ``~/.config`` where that is not set."""
    folder = environ.get("XDG_CONFIG_HOME", "")
    home = folder if os.path.isabs(folder) else os.path.expanduser("~/.config")
    return Path(os.path.normpath(home)) / "kvstrata" / "secret"


@dataclass(frozen=True)
class Config:
    """Everything an operator may set. Made by `load_config`; durations are in seconds."""

    node: str = option(
        kinds.NODE,
        "auto",
        "`auto`: start a node on demand, or join the one that this user already has with these "
        "options. `unix:/path`: join the service on that socket; `kvstrata serve` listens there.",
    )
    chunk_tokens: int = option(
        kinds.whole(16, 4096, multiple=16),
        "128",
        "Tokens of a chunk, the unit of storing and hitting; a multiple of the engine's block.",
    )
    tenant: str = option(kinds.TEXT, "default", "Whose keys these are; tenants never share a hit.")
    secret_file: Path = field(
        default_factory=lambda: default_secret_file(os.environ),
        metadata=about(
            kinds.PATH,
            "~/.config/kvstrata/secret",
            "The deployment's secret, which keys derive from; made at first start, exchanged with "
            "`kvstrata secret`. The default follows `XDG_CONFIG_HOME`. Machines that share stores "
            "share this file.",
            True,
        ),
    )
    linger: float = option(
        kinds.DURATION, "5s", "How long an on-demand node outlives its last client.", shared=True
    )
    log: str = option(kinds.one_of(LOG_LEVELS), "info", "The least severe message that is logged.")
    quality: str = option(
        kinds.BOUND,
        "none",
        "What `codec = auto` may do to answers, by the model's own table, see docs/quality.md; "
        "needed for it.",
        shared=True,
    )
    planner: str = option(
        kinds.one_of(("on", "off")),
        "on",
        "Whether what the engine computes sooner than a slower tier brings it is left to the "
        "engine, see docs/planner.md; `off`: all that is found is loaded.",
        shared=True,
    )
    inside: str = option(
        kinds.one_of(("on", "off")),
        "on",
        "Whether what a prompt has in common with a stored chunk that it parts from is reused, and "
        "ends shorter than a chunk are stored, see docs/inside.md.",
    )
    canary: float = option(
        kinds.EVERY,
        "1min",
        "How often a chunk of random bytes goes through each tier and back, see docs/metrics.md.",
        shared=True,
    )
    hints: tuple[str, ...] = option(
        kinds.HINT_NAMES,
        "max_load_tokens, max_store_tokens, store, load",
        "What clients may say of the cache with a request, see docs/hints.md.",
    )
    host: HostConfig = field(default_factory=HostConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    tiers: tuple[TierPart, ...] = ()
    """Below the pool, fastest first."""
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)
    leases: LeaseConfig = field(default_factory=LeaseConfig)
    pins: PinConfig = field(default_factory=PinConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each value that is no default came from: file, environment or override."""

    def tier(self, name: str) -> TierPart | None:
        """The part of this name; None if the tier is not configured."""
        return next((part for part in self.tiers if part.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Nested text and integers, as in a file; ``load_config(None, {}, it)`` is equal.

        With every password, so it is for programs; people are shown `shown`.
        """
        return _nested(_values(self))

    def shown(self) -> dict[str, Any]:
        """The same without passwords."""
        return _nested(_shown(self))

    def node_identity(self, uid: int | None = None) -> str:
        """16 hex digits, equal for two clients that may share one on-demand node.

        Covers the user and every option of the node, no option of a client.
        """
        shared = {path: value for path, value in _values(self) if OPTIONS[path].shared}
        text = json.dumps([os.getuid() if uid is None else uid, shared], sort_keys=True)
        return blake2b(text.encode(), digest_size=8).hexdigest()


class Option(NamedTuple):
    """One option as the parser and the documentation see it."""

    path: str
    kind: kinds.Kind
    default: str | None  # None: mandatory
    about: str
    shared: bool

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return "KVSTRATA_" + self.path.upper().replace(".", "_")


PARTS: Mapping[str, type] = {  # the dataclass of each part, by its path
    "": Config,
    "host": HostConfig,
    **{part.name: part for part in TIERS},
    "network": NetworkConfig,
    "fleet": FleetConfig,
    "api": ApiConfig,
    "deadlines": DeadlineConfig,
    "leases": LeaseConfig,
    "pins": PinConfig,
    "tracing": TracingConfig,
}

MAY_BE_MISSING = tuple(part.name for part in TIERS)  # only if something of them is given

OPTIONS: Mapping[str, Option] = {
    path: Option(path, **item.metadata)
    for part, cls in PARTS.items()
    for item in fields(cls)
    if item.metadata
    for path in [f"{part}.{item.name}" if part else item.name]
}
"""Every option by its dotted path, in the order of the documentation."""


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
        for name in _mandatory(cls):
            if name not in arguments:
                needed = " and ".join(prefix + other for other in _mandatory(cls))
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


def _mandatory(cls: type) -> list[str]:
    """Options of a part that have no default."""
    return [item.name for item in fields(cls) if item.metadata and item.metadata["default"] is None]


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


def _part(config: Config, name: str) -> Any:
    """The part of this name; None if it is not there."""
    if name in MAY_BE_MISSING:
        return config.tier(name)
    return getattr(config, name) if name else config


def differing(one: Config, other: Config) -> list[str]:
    """The options in which two configurations differ, by their paths; parts that one lacks too."""
    values, others = dict(_values(one)), dict(_values(other))
    return [path for path in OPTIONS if values.get(path) != others.get(path)]


def _nested(values: Iterator[tuple[str, str | int]]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in values:
        part, _, name = path.rpartition(".")
        (nested.setdefault(part, {}) if part else nested)[name] = value
    return nested


def _values(config: Config) -> Iterator[tuple[str, str | int]]:
    """Each option that is set, by its path, as a file writes it."""
    for path, known in OPTIONS.items():
        part, _, name = path.rpartition(".")
        owner = _part(config, part)
        if owner is not None:
            yield path, known.kind.format(getattr(owner, name))


def _shown(config: Config) -> Iterator[tuple[str, str | int]]:
    """The same, as people may see it."""
    for path, value in _values(config):
        part, _, name = path.rpartition(".")
        show = OPTIONS[path].kind.show
        yield path, value if show is None else show(getattr(_part(config, part), name))


def effective(config: Config) -> str:
    """The whole configuration as TOML that loads as an equal one, each value with its source.

    But for passwords, which are left out; it loads once they are put in.
    """
    lines: list[str] = []
    part = ""
    for path, value in _shown(config):
        owner, _, name = path.rpartition(".")
        if owner != part:
            part = owner
            lines += ["", f"[{part}]"]
        # JSON's strings and integers are TOML's: no value holds a control character.
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f"{name} = {text}  # {config.sources.get(path, 'default')}")
    for part in MAY_BE_MISSING:
        if config.tier(part) is None:
            needed = " and ".join(_mandatory(PARTS[part])) or "options"
            lines += ["", f"# no {part} tier: [{part}] {needed} not given"]
    return "\n".join(lines) + "\n"
