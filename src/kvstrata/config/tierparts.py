"""What any tier's part of the configuration is, and the words that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from kvstrata import units
from kvstrata.config import kinds
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.tiers.base import OwnedTier, SharedTier

CAPACITY = "Bytes of objects, as they are stored, that the tier may hold."
CODEC = (
    "How new objects are stored: `raw`, `lossless`, `exact`: the one of these two that this tier "
    "gives back sooner, a lossy one of docs/codecs.md, or `auto`: the one that saves the most load "
    "time within `quality`."
)
SCRUB = "How fast stored objects are re-read and verified; 0: never."
ENCRYPTION = (
    "Where the keys come from that objects are encrypted with: a file, a variable or a command "
    "that yields 64 hex digits a line, see docs/encryption.md; `none`: they are not."
)
QUEUE = "Bytes that may wait to be written; beyond it stores skip."


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
    codec: str
    io_threads: int
    write_queue: int
    coarser: tuple[str, ...] = ()
    encryption: str = "none"
    load_target: float = 0.0

    @property
    def host_bytes(self) -> int:
        """Host memory that it takes from what the pool could have."""
        return 0

    @abstractmethod
    def check(self, room: Room) -> None:
        """Raise `ConfigError` where options do not go together, or ask for more than there is."""

    @abstractmethod
    def open(self, config: Any) -> OwnedTier | SharedTier:
        """The tier.

        Args:
            config: the whole configuration, of which this is a part.
        Raises:
            ConfigError, Incompatible, TierUnavailable: it cannot be had; the message says why.
        """


def check_fits(path: str, capacity: int, limit: int, what: str) -> None:
    """Raise `ConfigError` where a capacity is beyond a limit."""
    if capacity > limit:
        size, bound = units.format_size(capacity), units.approximate_size(limit)
        raise ConfigError(path, f"{size} is more than the {what}; expected at most {bound}")


def check_coarser(part: TierPart) -> None:
    """Raise `ConfigError` where coarser copies would be kept for nothing."""
    if part.coarser and not part.load_target:
        raise ConfigError(
            f"{part.name}.load_target",
            f"missing, but {part.name}.coarser is given, which is only read to meet it; expected "
            f"{kinds.DURATION.expected}",
        )
