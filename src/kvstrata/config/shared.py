"""Tiers that a fleet shares: each has its options, and opens its tier."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstrata import units
from kvstrata.config import kinds
from kvstrata.config.parts import option
from kvstrata.config.tierparts import CODEC, ENCRYPTION, QUEUE, Room, TierPart, check_coarser

if TYPE_CHECKING:
    from kvstrata.tiers.base import SharedTier

PREFIX = (
    "What the names of all objects begin with, so that several fleets can use one store; nodes "
    "that share have the same."
)
LOOKUP = (
    "How long a match waits for the store to say what it has; what is not heard by then is there "
    "for the next one. A store that is far away is waited for longer: one and a half of its usual "
    "round trips, 150ms at most."
)


LONGEST_PREFIX = 64


def _prefix(value: Any) -> str:
    # No sign that a store's pattern or hash tag is made of but the dot.
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._:/-]+", value):
        raise ValueError(f"{value!r} has other characters, or none")
    if len(value) > LONGEST_PREFIX:
        raise ValueError(f"{value!r} is too long")
    return value


NAME = kinds.Kind(_prefix, str, f"1 to {LONGEST_PREFIX} letters, digits, . _ : / and -")


SHORTEST_EPOCH_S, LONGEST_EPOCH_S = 0.1, 3600.0


def _epoch(value: Any) -> float:
    seconds = units.parse_duration(value)
    if not SHORTEST_EPOCH_S <= seconds <= LONGEST_EPOCH_S:
        raise ValueError(f"{value!r} is too short or too long")
    return seconds


EPOCH = kinds.Kind(_epoch, units.format_duration, 'a duration from "100ms" to "1h"')


@dataclass(frozen=True, kw_only=True)
class SharedPart(TierPart):
    """What every tier has that others write to: no budget of this node's, and no scan."""

    codec: str = option(kinds.CODEC, "exact", CODEC, shared=True)
    coarser: tuple[str, ...] = option(kinds.CODECS, "none", "As of the disk tier.", shared=True)
    load_target: float = option(kinds.DURATION, "0s", "As of the disk tier.", shared=True)
    encryption: str = option(kinds.ENCRYPTION, "none", ENCRYPTION, shared=True)
    io_threads: int = option(
        kinds.whole(1, 64),
        "8",
        "Threads that read, as many that write, and for encoding half the cores at most.",
        shared=True,
    )
    write_queue: int = option(kinds.SIZE, "256MiB", QUEUE, shared=True)
    lookup_timeout: float = option(kinds.WAIT, "20ms", LOOKUP, shared=True)
    epoch_every: float = option(
        EPOCH,
        "5s",
        "For how long a node takes what it heard of a clear for the truth, so how long a clear "
        "takes. Whoever begins a store decides it for the fleet.",
        shared=True,
    )

    def check(self, room: Room) -> None:
        check_coarser(self)

    @abstractmethod
    def open(self, config: Any) -> SharedTier: ...
