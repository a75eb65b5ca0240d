"""One frozen configuration: every option there is, how one is written, how two differ.

The dataclasses are the only list of options; the parser, the printed configuration and
`docs/configuration.md` are derived from them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from kvstrata.config import kinds
from kvstrata.config.api import ApiConfig
from kvstrata.config.fleet import FleetConfig
from kvstrata.config.network import NetworkConfig
from kvstrata.config.parts import (
    DeadlineConfig,
    HostConfig,
    LeaseConfig,
    PinConfig,
    about,
    option,
)
from kvstrata.config.tierparts import TierPart
from kvstrata.config.tiers import TIERS
from kvstrata.config.tracing import TracingConfig

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
    meet: str = option(
        kinds.one_of(("off", "on")),
        "off",
        "Whether vLLM computes a prompt from its beginning while a slower tier brings its end, "
        "where that is sooner, see docs/meeting.md.",
    )
    blend: str = option(
        kinds.one_of(("off", "on")),
        "off",
        "Whether vLLM may reuse texts at other places of a prompt for requests that ask for it, "
        "which changes their answers, see docs/blend.md; the hint `blend` has to be allowed, too.",
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
    reset: str = option(
        kinds.one_of(("forget", "keep")),
        "forget",
        "What a reset of the connector does; vLLM sends one when it falls asleep, too. `forget`: "
        "what was stored before is not found again by this engine, whose weights may be exchanged. "
        "`keep`: nothing, for an engine whose weights never are.",
    )
    share: tuple[str, ...] = option(
        kinds.SHARING,
        "none",
        "Whose KV an engine loads although it would compute it with another rounding, see "
        "docs/sharing.md. `engines`: of other engines of this model; `ranks`: of other "
        "tensor-parallel sizes; in either case of those that have this option, too.",
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


def mandatory(cls: type) -> list[str]:
    """Options of a part that have no default."""
    return [item.name for item in fields(cls) if item.metadata and item.metadata["default"] is None]


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
            needed = " and ".join(mandatory(PARTS[part])) or "options"
            lines += ["", f"# no {part} tier: [{part}] {needed} not given"]
    return "\n".join(lines) + "\n"
