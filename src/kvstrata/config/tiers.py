"""The tiers that a configuration may name: each part has its options, and opens its tier.

A new tier is a part here and a line in `TIERS`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kvstrata import units
from kvstrata.config import kinds
from kvstrata.config.parts import about, option
from kvstrata.errors import ConfigError
from kvstrata.policies import POLICIES

if TYPE_CHECKING:
    from kvstrata.tiers.base import OwnedTier

_CAPACITY = "Bytes of objects, as they are stored, that the tier may hold."
_CODEC = (
    "How new objects are stored: `raw`, `lossless`, `exact`: the one of these two that this tier "
    "gives back sooner, a lossy one of docs/codecs.md, or `auto`: the one that saves the most load "
    "time within `quality`."
)
_SCRUB = "How fast stored objects are re-read and verified; 0: never."
_QUEUE = "Bytes that may wait to be written; beyond it stores skip."


class Room(NamedTuple):
    """What a tier's capacity is held against.

    Args:
        memory_bytes: asks for the host memory that is left beside the pool.
        disk_bytes: asks for the size of the file system that holds a path; 0: it does not say.
    """

    memory_bytes: Callable[[], int]
    disk_bytes: Callable[[Path], int]


class TierPart(ABC):
    """What is configured of a tier below the pool; its subclasses are frozen dataclasses."""

    name: ClassVar[str]
    capacity: int
    policy: str
    codec: str
    io_threads: int
    write_queue: int
    coarser: tuple[str, ...] = ()
    load_target: float = 0.0
    scrub_rate: int = 0

    @property
    def host_bytes(self) -> int:
        """Host memory that it takes from what the pool could have."""
        return 0

    @abstractmethod
    def check(self, room: Room) -> None:
        """Raise `ConfigError` where options do not go together, or ask for more than there is."""

    @abstractmethod
    def open(self) -> OwnedTier:
        """The tier.

        Raises:
            ConfigError, Incompatible, TierUnavailable: it cannot be had; the message says why.
        """


def check_fits(path: str, capacity: int, limit: int, what: str) -> None:
    """Raise `ConfigError` where a capacity is beyond a limit."""
    if capacity > limit:
        size, bound = units.format_size(capacity), units.approximate_size(limit)
        raise ConfigError(path, f"{size} is more than the {what}; expected at most {bound}")


@dataclass(frozen=True)
class MemoryConfig(TierPart):
    """Encoded objects in host memory, below the pool: more of them fit; off without `capacity`."""

    name: ClassVar[str] = "memory"
    capacity: int = field(metadata=about(kinds.SIZE, None, _CAPACITY, True))
    policy: str = option(kinds.one_of(tuple(POLICIES)), "lru", "Whom to evict.", shared=True)
    codec: str = option(kinds.CODEC, "lossless", _CODEC, shared=True)
    io_threads: int = option(
        kinds.whole(1, 64),
        "4",
        "Threads that decode, and as many that encode, on half the cores at most.",
        shared=True,
    )
    write_queue: int = option(kinds.SIZE, "256MiB", _QUEUE, shared=True)
    scrub_rate: int = option(kinds.RATE, "32MiB/s", _SCRUB, shared=True)

    @property
    def host_bytes(self) -> int:
        return self.capacity

    def check(self, room: Room) -> None:
        where = "memory this machine has beside host.capacity"
        check_fits("memory.capacity", self.capacity, room.memory_bytes(), where)

    def open(self) -> OwnedTier:
        from kvstrata.tiers.memory import MemoryTier

        return MemoryTier()


@dataclass(frozen=True)
class DiskConfig(TierPart):
    """The tier on local disk; off unless `path` and `capacity` are given, both of them."""

    name: ClassVar[str] = "disk"
    path: Path = field(
        metadata=about(kinds.PATH, None, "Folder of the tier; made if missing, for one node.", True)
    )
    capacity: int = field(metadata=about(kinds.SIZE, None, _CAPACITY, True))
    policy: str = option(kinds.one_of(tuple(POLICIES)), "lru", "Whom to evict.", shared=True)
    codec: str = option(kinds.CODEC, "exact", _CODEC, shared=True)
    coarser: tuple[str, ...] = option(
        kinds.CODECS,
        "none",
        "Lossy codecs of coarser copies to keep besides, finest first, for loads that would miss "
        "`load_target` otherwise.",
        shared=True,
    )
    load_target: float = option(
        kinds.DURATION,
        "0s",
        "Within it a request's load should end: chunk by chunk the finest copy that is in time is "
        "read, or the rest is computed where that is faster; 0: loads take what they take.",
        shared=True,
    )
    io_threads: int = option(
        kinds.whole(1, 64),
        "8",
        "Threads that read, as many that write, and for encoding half the cores at most.",
        shared=True,
    )
    write_queue: int = option(kinds.SIZE, "256MiB", _QUEUE, shared=True)
    scrub_rate: int = option(kinds.RATE, "32MiB/s", _SCRUB, shared=True)

    def check(self, room: Room) -> None:
        if self.coarser and not self.load_target:
            raise ConfigError(
                "disk.load_target",
                f"missing, but disk.coarser is given, which is only read to meet it; expected "
                f"{kinds.DURATION.expected}",
            )
        if size := room.disk_bytes(self.path):
            check_fits("disk.capacity", self.capacity, size, f"file system of {self.path}")

    def open(self) -> OwnedTier:
        from kvstrata.tiers.disk.tier import DiskTier

        return DiskTier(self.path)


TIERS: tuple[type[TierPart], ...] = (MemoryConfig, DiskConfig)
"""Every kind of tier, fastest first."""


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
