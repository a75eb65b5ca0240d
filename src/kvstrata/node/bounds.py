"""What a search knows of boundaries, where not every part is needed of every chunk."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.errors import UsageError
from kvstrata.node.slots.boundaries import Stretch, stretches
from kvstrata.node.slots.slot import Slot
from kvstrata.wire import protocol as p


class Bounds:
    """Of one search.

    Args:
        parts: that make up a chunk.
        needs: of each, how many of the last chunks are needed; 0: all.
        tail: number of the chunk that is no whole one, but the prompt's end; -1: all are whole.

    Raises:
        UsageError: these needs do not go with the parts.
    """

    def __init__(self, parts: tuple[int, ...], needs: Sequence[int], tail: int = -1) -> None:
        if len(needs) != len(parts):
            raise UsageError(f"{len(parts)} parts, but the needs of {len(needs)}")
        if not all(0 <= need <= p.MAX_KEYS for need in needs):
            raise UsageError(f"of a part the last 1 to {p.MAX_KEYS} chunks are needed, or 0: all")
        self.parts = parts
        self.needs = tuple(needs)
        self.tail = tail
        self.full = tuple(part for part, need in zip(parts, needs, strict=True) if not need)
        self.end = 0  # how many leading chunks have all that is needed of every chunk
        self.boundary = 0  # the longest that was found
        self.hole = -1  # the chunk without which the end is no boundary
        self.shape: list[Stretch] = []  # of what is being leased
        self.left: list[Slot] = []  # made to bring something into, and let go of

    @classmethod
    def of(cls, message: p.Match, parts: tuple[int, ...]) -> Bounds | None:
        """Those of a match; None where every chunk of each part is needed.

        Raises:
            UsageError: its needs do not go with what else it asks for.
        """
        if not any(message.needs):
            return None
        return cls(parts, message.needs, p.count(message.keys, 32) - 1 if message.tail else -1)

    def needs_at(self, boundary: int) -> tuple[int, ...]:
        """Of each part, how many of the last chunks this boundary needs; 0: all.

        What a window reaches back to from a prompt's end are as many whole chunks as from a chunk's
        end, at most, and the end itself.
        """
        if not 0 <= self.tail < boundary:
            return self.needs
        return tuple(need and need + 1 for need in self.needs)

    def stretches(self) -> list[Stretch]:
        """All chunks before the boundary, by what is needed of them."""
        return stretches(self.needs_at(self.boundary), self.boundary)

    def parts_of(self, stretch: Stretch) -> tuple[int, ...]:
        """What is needed of its chunks."""
        return tuple(self.parts[column] for column in stretch.columns)
