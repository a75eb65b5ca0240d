"""Tiers that belong to one node: each has its options, and opens its tier."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvstrata.config import kinds
from kvstrata.config.parts import about, option
from kvstrata.config.tierparts import (
    CAPACITY,
    CODEC,
    ENCRYPTION,
    QUEUE,
    SCRUB,
    Room,
    TierPart,
    check_coarser,
    check_fits,
)
from kvstrata.policies import POLICIES

if TYPE_CHECKING:
    from kvstrata.tiers.base import OwnedTier


class OwnedPart(TierPart):
    """A tier with a byte budget, a policy and a scrub, which are the node's."""

    capacity: int
    policy: str
    scrub_rate: int


@dataclass(frozen=True)
class MemoryConfig(OwnedPart):
    """Encoded objects in host memory, below the pool: more of them fit; off without `capacity`."""

    name: ClassVar[str] = "memory"
    capacity: int = field(metadata=about(kinds.SIZE, None, CAPACITY, True))
    policy: str = option(kinds.one_of(tuple(POLICIES)), "lru", "Whom to evict.", shared=True)
    codec: str = option(kinds.CODEC, "lossless", CODEC, shared=True)
    io_threads: int = option(
        kinds.whole(1, 64),
        "4",
        "Threads that decode, and as many that encode, on half the cores at most.",
        shared=True,
    )
    write_queue: int = option(kinds.SIZE, "256MiB", QUEUE, shared=True)
    scrub_rate: int = option(kinds.RATE, "32MiB/s", SCRUB, shared=True)

    @property
    def host_bytes(self) -> int:
        return self.capacity

    def check(self, room: Room) -> None:
        where = "memory this machine has beside host.capacity"
        check_fits("memory.capacity", self.capacity, room.memory_bytes(), where)

    def open(self, config: Any) -> OwnedTier:
        from kvstrata.tiers.memory import MemoryTier

        return MemoryTier()


@dataclass(frozen=True)
class DiskConfig(OwnedPart):
    """The tier on local disk; off unless `path` and `capacity` are given, both of them."""

    name: ClassVar[str] = "disk"
    path: Path = field(
        metadata=about(kinds.PATH, None, "Folder of the tier; made if missing, for one node.", True)
    )
    capacity: int = field(metadata=about(kinds.SIZE, None, CAPACITY, True))
    policy: str = option(kinds.one_of(tuple(POLICIES)), "lru", "Whom to evict.", shared=True)
    codec: str = option(kinds.CODEC, "exact", CODEC, shared=True)
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
    encryption: str = option(kinds.ENCRYPTION, "none", ENCRYPTION, shared=True)
    io_threads: int = option(
        kinds.whole(1, 64),
        "8",
        "Threads that read, as many that write, and for encoding half the cores at most.",
        shared=True,
    )
    write_queue: int = option(kinds.SIZE, "256MiB", QUEUE, shared=True)
    scrub_rate: int = option(kinds.RATE, "32MiB/s", SCRUB, shared=True)

    def check(self, room: Room) -> None:
        check_coarser(self)
        if size := room.disk_bytes(self.path):
            check_fits("disk.capacity", self.capacity, size, f"file system of {self.path}")

    def open(self, config: Any) -> OwnedTier:
        from kvstrata.tiers.disk.tier import DiskTier

        return DiskTier(self.path)


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
