"""What a search knows of boundaries, where not every part is needed of every chunk."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.errors import UsageError
from kvstrata.node.slots.boundaries import Stretch
from kvstrata.node.slots.slot import Slot
from kvstrata.wire import protocol as p


class Bounds:
    """Of one search.

    Args:
        parts: that make up a chunk.
        needs: of each, how many of the last chunks are needed; 0: all.

    Raises:
        UsageError: these needs do not go with the parts.
    """

    def __init__(self, parts: tuple[int, ...], needs: Sequence[int]) -> None:
        if len(needs) != len(parts):
            raise UsageError(f"{len(parts)} parts, but the needs of {len(needs)}")
        if not all(0 <= need <= p.MAX_KEYS for need in needs):
            raise UsageError(f"of a part the last 1 to {p.MAX_KEYS} chunks are needed, or 0: all")
        self.parts = parts
        self.needs = tuple(needs)
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
        if message.expected_s or message.tail:
            raise UsageError("what a peer is about to have, and a tail, go with needs of 0 only")
        return cls(parts, message.needs)

    def parts_of(self, stretch: Stretch) -> tuple[int, ...]:
        """What is needed of its chunks."""
        return tuple(self.parts[column] for column in stretch.columns)
