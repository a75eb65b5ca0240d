"""Parts of the configuration that are no tiers, and how an option of any part is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kvstrata.config import kinds
from kvstrata.policies import POLICIES


def about(kind: kinds.Kind, default: str | None, words: str, shared: bool) -> Mapping[str, Any]:
    return {"kind": kind, "default": default, "about": words, "shared": shared}


def option(kind: kinds.Kind, default: str, words: str, *, shared: bool = False) -> Any:
    """A field with a default, written as in a file; ``shared``: the node's, not a client's."""
    return field(default=kind.parse(default), metadata=about(kind, default, words, shared))


@dataclass(frozen=True)
class HostConfig:
    """The pool in host memory."""

    capacity: int | Fraction = option(  # noqa: RUF009 - it calls field()
        kinds.SIZE_OR_SHARE,
        "20%",
        "Size of the pool, or its share of the memory available when the node starts, less "
        "`memory.capacity`.",
        shared=True,
    )
    policy: str = option(kinds.one_of(tuple(POLICIES)), "lru", "Whom to evict.", shared=True)
    verify_every: int = option(
        kinds.whole(0, 10**6),
        "64",
        "One hit in this many is checked against its checksum again; 1: every hit, 0: none.",
        shared=True,
    )


@dataclass(frozen=True)
class DeadlineConfig:
    """How long a client waits before it counts a miss and computes; in Python in seconds."""

    match: float = option(
        kinds.WAIT,
        "2ms",
        "A match, in each of the engine's steps; a small part of a step while requests run.",
    )
    request: float = option(kinds.WAIT, "250ms", "The answer to any other message.")
    load: float = option(kinds.WAIT, "10s", "All of one request's load.")
    attach: float = option(kinds.WAIT, "30s", "Starting or joining the node.")


@dataclass(frozen=True)
class LeaseConfig:
    """How much of the pool may be held still by loads that wait or run."""

    per_client: Fraction = option(  # noqa: RUF009 - it calls field()
        kinds.SHARE, "50%", "By the connections of one process.", shared=True
    )
    total: Fraction = option(  # noqa: RUF009 - it calls field()
        kinds.SHARE, "80%", "By all clients together.", shared=True
    )


@dataclass(frozen=True)
class PinConfig:
    """How much of each tier of the node's own pins may keep from being evicted."""

    per_tenant: Fraction = option(  # noqa: RUF009 - it calls field()
        kinds.SHARE, "10%", "For one tenant.", shared=True
    )
    total: Fraction = option(  # noqa: RUF009 - it calls field()
        kinds.SHARE, "25%", "For all tenants together.", shared=True
    )
