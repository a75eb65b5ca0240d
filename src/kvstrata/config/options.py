"""One frozen, strict configuration: a file, the environment and a dict go through one parser.

The dataclasses below are the only list of options; the parser, the printed configuration and
`docs/configuration.md` are derived from them. Nothing is ignored: an unknown key, a bad unit or a
capacity larger than the machine is a `ConfigError` with the key's path and what was expected.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from kvstrata import units
from kvstrata.config import kinds
from kvstrata.config.files import read_file
from kvstrata.errors import ConfigError, did_you_mean
from kvstrata.memory.machine import total_bytes
from kvstrata.policies import POLICIES

LOG_LEVELS = ("debug", "info", "warning", "error")

OTHER_VARIABLES: Mapping[str, str] = {
    "KVSTRATA_CONFIG": "the configuration file (`.toml`, `.yaml` or `.yml`)",
    "KVSTRATA_MODEL_CACHE": "where the demo and the tests keep the models that they prepared",
    "KVSTRATA_REQUIRE_ENGINE": "`1`: the engine tests fail, not skip, where vLLM is missing",
}
"""KVSTRATA_* variables that are no option."""

# Kubernetes describes a service named "kvstrata..." to every pod in variables of these shapes.
_KUBERNETES = re.compile(
    r"KVSTRATA(_[A-Z0-9_]+)?_(SERVICE_HOST=.*|SERVICE_PORT(_[A-Z0-9_]+)?=[0-9]+"
    r"|PORT=[a-z]+://.*|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*)"
)


def default_secret_file(environ: Mapping[str, str]) -> Path:
    """``$XDG_CONFIG_HOME/kvstrata/secret``, or below ``~/.config`` where that is not set."""
    folder = environ.get("XDG_CONFIG_HOME", "")
    home = folder if os.path.isabs(folder) else os.path.expanduser("~/.config")
    return Path(os.path.normpath(home)) / "kvstrata" / "secret"


def _about(kind: kinds.Kind, default: str | None, about: str, shared: bool) -> Mapping[str, Any]:
    return {"kind": kind, "default": default, "about": about, "shared": shared}


def _option(kind: kinds.Kind, default: str, about: str, *, shared: bool = False) -> Any:
    """A field with a default, written as in a file; ``shared``: the node's, not a client's."""
    return field(default=kind.parse(default), metadata=_about(kind, default, about, shared))


@dataclass(frozen=True)
class HostConfig:
    """The pool in host memory."""

    capacity: int | Fraction = _option(  # noqa: RUF009 - it calls field()
        kinds.SIZE_OR_SHARE,
        "20%",
        "Size of the pool, or its share of the memory available when the node starts, less "
        "`memory.capacity`.",
        shared=True,
    )
    policy: str = _option(kinds.one_of(tuple(POLICIES)), "lru", "Whom to evict.", shared=True)
    verify_every: int = _option(
        kinds.whole(0, 10**6),
        "64",
        "One hit in this many is checked against its checksum again; 1: every hit, 0: none.",
        shared=True,
    )


_CAPACITY = "Bytes of objects, as they are stored, that the tier may hold."
_CODEC = (
    "How new objects are stored: `raw`, `lossless`, `exact`: the one of these two that this tier "
    "gives back sooner, a lossy one of docs/codecs.md, or `auto`: the one that saves the most load "
    "time within `quality`."
)
_QUEUE = "Bytes that may wait to be written; beyond it stores skip."


@dataclass(frozen=True)
class MemoryConfig:
    """Encoded objects in host memory, below the pool: more of them fit; off without `capacity`."""

    name: ClassVar[str] = "memory"
    capacity: int = field(metadata=_about(kinds.SIZE, None, _CAPACITY, True))
    policy: str = _option(kinds.one_of(tuple(POLICIES)), "lru", "Whom to evict.", shared=True)
    codec: str = _option(kinds.CODEC, "lossless", _CODEC, shared=True)
    io_threads: int = _option(
        kinds.whole(1, 64), "4", "Threads that encode, and as many that decode.", shared=True
    )
    write_queue: int = _option(kinds.SIZE, "256MiB", _QUEUE, shared=True)


@dataclass(frozen=True)
class DiskConfig:
    """The tier on local disk; off unless `path` and `capacity` are given, both of them."""

    name: ClassVar[str] = "disk"
    path: Path = field(
        metadata=_about(
            kinds.PATH, None, "Folder of the tier; made if missing, for one node.", True
        )
    )
    capacity: int = field(metadata=_about(kinds.SIZE, None, _CAPACITY, True))
    policy: str = _option(kinds.one_of(tuple(POLICIES)), "lru", "Whom to evict.", shared=True)
    codec: str = _option(kinds.CODEC, "exact", _CODEC, shared=True)
    coarser: tuple[str, ...] = _option(
        kinds.CODECS,
        "none",
        "Lossy codecs of coarser copies to keep besides, finest first, for loads that would miss "
        "`load_target` otherwise.",
        shared=True,
    )
    load_target: float = _option(
        kinds.DURATION,
        "0s",
        "Within it a request's load should end: chunk by chunk the finest copy that is in time is "
        "read, or the rest is computed where that is faster; 0: loads take what they take.",
        shared=True,
    )
    io_threads: int = _option(
        kinds.whole(1, 64),
        "8",
        "Threads that read and write; a hung disk costs no more.",
        shared=True,
    )
    write_queue: int = _option(kinds.SIZE, "256MiB", _QUEUE, shared=True)
    scrub_rate: int = _option(
        kinds.RATE,
        "32MiB/s",
        "How fast stored objects are re-read and verified; 0: never.",
        shared=True,
    )


@dataclass(frozen=True)
class DeadlineConfig:
    """How long a client waits before it counts a miss and computes; in Python in seconds."""

    match: float = _option(kinds.WAIT, "2ms", "A match, while the engine has nothing else to run.")
    request: float = _option(kinds.WAIT, "250ms", "The answer to any other message.")
    load: float = _option(kinds.WAIT, "10s", "All of one request's load.")
    attach: float = _option(kinds.WAIT, "30s", "Starting or joining the node.")


@dataclass(frozen=True)
class LeaseConfig:
    """How much of the pool may be held still by loads that wait or run."""

    per_client: Fraction = _option(  # noqa: RUF009 - it calls field()
        kinds.SHARE, "50%", "By one client.", shared=True
    )
    total: Fraction = _option(  # noqa: RUF009 - it calls field()
        kinds.SHARE, "80%", "By all clients together.", shared=True
    )


@dataclass(frozen=True)
class Config:
    """Everything an operator may set. Made by `load_config`; durations are in seconds."""

    node: str = _option(
        kinds.NODE,
        "auto",
        "`auto`: start a node on demand, or join the one that this user already has with these "
        "options. `unix:/path`: join the service on that socket; `kvstrata serve` listens there.",
    )
    chunk_tokens: int = _option(
        kinds.whole(16, 4096, multiple=16),
        "128",
        "Tokens of a chunk, the unit of storing and hitting; a multiple of the engine's block.",
    )
    tenant: str = _option(kinds.TEXT, "default", "Whose keys these are; tenants never share a hit.")
    secret_file: Path = field(
        default_factory=lambda: default_secret_file(os.environ),
        metadata=_about(
            kinds.PATH,
            "~/.config/kvstrata/secret",
            "The deployment's secret, which keys derive from; made at first start. The default "
            "follows `XDG_CONFIG_HOME`. Machines that share stores share this file.",
            True,
        ),
    )
    linger: float = _option(
        kinds.DURATION, "5s", "How long an on-demand node outlives its last client.", shared=True
    )
    log: str = _option(kinds.one_of(LOG_LEVELS), "info", "The least severe message that is logged.")
    quality: str = _option(
        kinds.BOUND,
        "none",
        "What `codec = auto` may do to answers, by the model's own table, see docs/quality.md; "
        "needed for it.",
        shared=True,
    )
    host: HostConfig = field(default_factory=HostConfig)
    memory: MemoryConfig | None = None
    disk: DiskConfig | None = None
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)
    leases: LeaseConfig = field(default_factory=LeaseConfig)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each value that is no default came from: file, environment or override."""

    def to_dict(self) -> dict[str, Any]:
        """Nested text and integers, as in a file; ``load_config(None, {}, it)`` is equal."""
        nested: dict[str, Any] = {}
        for path, value in _values(self):
            part, _, name = path.rpartition(".")
            (nested.setdefault(part, {}) if part else nested)[name] = value
        return nested

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


PARTS: Mapping[str, type] = {
    "": Config,
    "host": HostConfig,
    "memory": MemoryConfig,
    "disk": DiskConfig,
    "deadlines": DeadlineConfig,
    "leases": LeaseConfig,
}
"""The dataclass of each part, by its path."""

MAY_BE_MISSING = ("memory", "disk")
"""Parts that are only there if something of them is given."""

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


def file_system_bytes(path: Path) -> int:
    """Size of the file system that ``path`` is on, or will be on; 0 if it does not say in 2 s."""
    found: list[int] = []

    def measure() -> None:
        folder = path
        while not os.path.exists(folder) and folder != folder.parent:
            folder = folder.parent
        with contextlib.suppress(OSError):
            answer = os.statvfs(folder)
            found.append(answer.f_blocks * answer.f_frsize)

    # A dead network file system never answers; it must not keep an engine from starting.
    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    thread.join(timeout=2.0)
    return found[0] if found else 0


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
                    f"missing, but {named[0]} is given ({given[named[0]].where}); a {part} tier "
                    f"needs {needed}; expected {OPTIONS[prefix + name].kind.expected}",
                )
        parts[part] = arguments if part == "" else cls(**arguments)
    sources = {path: item.source for path, item in given.items() if path in OPTIONS}
    config = Config(**parts.pop(""), **parts, sources=sources)
    _check_sums(config, memory_bytes, disk_bytes)
    return config


def _mandatory(cls: type) -> list[str]:
    """Options of a part that have no default."""
    return [item.name for item in fields(cls) if item.metadata and item.metadata["default"] is None]


def _check_sums(
    config: Config, memory_bytes: int | None, disk_bytes: Callable[[Path], int]
) -> None:
    for part in (config.memory, config.disk):
        if part is not None and part.codec == "auto" and config.quality == "none":
            raise ConfigError(
                "quality",
                f"missing, but {part.name}.codec is auto; expected {kinds.BOUND.expected}",
            )
    if config.disk is not None and config.disk.coarser and not config.disk.load_target:
        raise ConfigError(
            "disk.load_target",
            f"missing, but disk.coarser is given, which is only read to meet it; expected "
            f"{kinds.DURATION.expected}",
        )
    leases = config.leases
    if leases.per_client > leases.total:
        total = units.format_fraction(leases.total)
        share = units.format_fraction(leases.per_client)
        raise ConfigError("leases.per_client", f"{share} is more than leases.total, {total}")
    pool = config.host.capacity if isinstance(config.host.capacity, int) else 0
    encoded = config.memory.capacity if config.memory is not None else 0
    if pool or encoded:
        if memory_bytes is None:
            memory_bytes = total_bytes()
        _check_fits("host.capacity", pool, memory_bytes, "memory this machine has")
        where = "memory this machine has beside host.capacity"
        _check_fits("memory.capacity", encoded, max(0, memory_bytes - pool), where)
    if config.disk is not None and (size := disk_bytes(config.disk.path)):
        where = f"file system of {config.disk.path}"
        _check_fits("disk.capacity", config.disk.capacity, size, where)


def _check_fits(path: str, capacity: int, limit: int, what: str) -> None:
    if capacity > limit:
        size, bound = units.format_size(capacity), units.approximate_size(limit)
        raise ConfigError(path, f"{size} is more than the {what}; expected at most {bound}")


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
                raise ConfigError(path, f"{value!r} is not a table of {keys} ({where})")
            found = _flatten(value, source, where, f"{path}.") or {path: _Given({}, source, where)}
        else:
            raise ConfigError(path, f"unknown key{_hint(path)} ({where})")
        if twice := flat.keys() & found.keys():
            raise ConfigError(min(twice), f"given twice ({where})")
        flat.update(found)
    return flat


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, _Given]]:
    variables = {option.variable: option.path for option in OPTIONS.values()}
    for name, value in environ.items():
        if name in variables:
            where = f"environment variable {name}"
            yield variables[name], _Given(value, "environment", where)
        elif (
            name.startswith("KVSTRATA_")
            and name not in OTHER_VARIABLES
            and not _KUBERNETES.fullmatch(f"{name}={value}")
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


def _values(config: Config) -> Iterator[tuple[str, str | int]]:
    """Each option that is set, by its path, as a file writes it."""
    for path, option in OPTIONS.items():
        part, _, name = path.rpartition(".")
        owner = getattr(config, part) if part else config
        if owner is not None:
            yield path, option.kind.format(getattr(owner, name))


def effective(config: Config) -> str:
    """The whole configuration as TOML that loads as an equal one, each value with its source."""
    lines: list[str] = []
    part = ""
    for path, value in _values(config):
        owner, _, name = path.rpartition(".")
        if owner != part:
            part = owner
            lines += ["", f"[{part}]"]
        # JSON's strings and integers are TOML's: no value holds a control character.
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f"{name} = {text}  # {config.sources.get(path, 'default')}")
    for part in MAY_BE_MISSING:
        if getattr(config, part) is None:
            needed = " and ".join(_mandatory(PARTS[part]))
            lines += ["", f"# no {part} tier: [{part}] {needed} not given"]
    return "\n".join(lines) + "\n"


def host_capacity_bytes(config: Config, available_bytes: int) -> int:
    """Size of the pool in bytes, a multiple of 4096.

    Args:
        available_bytes: memory that can be taken now; a share is a share of this, less what the
            tier of encoded objects may take.
    Raises:
        ConfigError: that leaves nothing.
    """
    capacity = config.host.capacity
    encoded = config.memory.capacity if config.memory is not None else 0
    left = max(available_bytes - encoded, 0)
    wanted = capacity if isinstance(capacity, int) else int(capacity * left)
    if wanted < kinds.MIN_CAPACITY and encoded:
        size, have = units.format_size(encoded), units.approximate_size(available_bytes)
        raise ConfigError("memory.capacity", f"{size} of {have} leaves nothing for the pool")
    return wanted // 4096 * 4096
