"""Where the fleet's registry is, and who this node is in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kvstrata.config import kinds
from kvstrata.config.parts import option
from kvstrata.config.shared import NAME, PREFIX
from kvstrata.tiers.redis.address import EXPECTED, Address, parse_address

LONGEST_NAME = 64


def _registry(value: Any) -> Address | None:
    return None if value == "none" else parse_address(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", value):
        raise ValueError(f"{value!r} has other characters, or none")
    if len(value) > LONGEST_NAME:
        raise ValueError(f"{value!r} is too long")
    return value


REGISTRY = kinds.Kind(
    _registry,
    lambda value: "none" if value is None else str(value.url),
    f'"none", or {EXPECTED}',
    lambda value: str(value or "none"),
)
MEMBER = kinds.Kind(_name, str, f"1 to {LONGEST_NAME} letters, digits, . _ and -")


@dataclass(frozen=True)
class FleetConfig:
    """The fleet that this node is a member of, see docs/fleet.md; none without `registry`."""

    registry: Address | None = option(  # noqa: RUF009 - it calls field()
        REGISTRY,
        "none",
        "The Redis or Valkey where the nodes of a fleet register, written as `redis.url`; `none`: "
        "this node is in no fleet.",
        shared=True,
    )
    name: str = option(
        MEMBER,
        "auto",
        "This node's name there, which no other has and which it keeps; `auto`: the machine's, and "
        "a digest of the socket's path.",
        shared=True,
    )
    prefix: str = option(NAME, "kvstrata", PREFIX, shared=True)
