"""Where a chunk's parts are: in slots, or still to be brought."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvstrata.node.service.backing import Backing
from kvstrata.node.service.promotions import Wanted
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Row, Slot
from kvstrata.parts import PORTABLE
from kvstrata.wire import protocol as p


class Located(NamedTuple):
    """Where the parts of a chunk are.

    Args:
        key: of the chunk.
        places: for each part its slot, or what is to be promoted.
        tier: number of the slowest tier that has one of them, 0: host memory.
        row: its row, where host memory knows one.
    """

    key: bytes
    places: list[Slot | Wanted]
    tier: int
    row: Row | None

    @property
    def wanted(self) -> list[Wanted]:
        """What is to be promoted."""
        return [place for place in self.places if isinstance(place, Wanted)]

    @property
    def new_bytes(self) -> int:
        """What leasing it adds to what is leased."""
        if self.row is not None:
            return 0 if self.row.payer is not None else self.row.nbytes
        return sum(place.nbytes for place in self.places)


def with_slots(places: Iterable[Slot | Wanted], new: Iterable[Slot]) -> list[Slot]:
    """The slots of a chunk: those it has, and for what is wanted the new ones, in order."""
    following = iter(new)
    return [next(following) if isinstance(place, Wanted) else place for place in places]


def presence(
    host: HostMemory, backings: Iterable[Backing], key: bytes, part: int, order: str
) -> int:
    """`PRESENT` if an object need not be written, else 0.

    One in another engine's order is of no use to this writer's kind, and may be replaced. Every
    engine reads the portable order. What a lossy codec keeps is in it, so that no KV that was
    loaded from such a tier is ever encoded a second time.
    """
    orders = (order, PORTABLE)
    slot = host.get(key, part)
    if slot is not None:
        return p.PRESENT if slot.order in orders else 0
    return p.PRESENT if any(one.has(key, part, orders) for one in backings) else 0
