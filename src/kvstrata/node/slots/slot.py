"""A slot, a region of the pool with one object in it; and a row, the slots of one chunk's parts.

Who reads a chunk reads all of its parts, so what concerns readers is counted once for the row: a
match of a thousand chunks of eight ranks touches a thousand rows, and no slot.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum

from kvstrata.node.common.owners import Account
from kvstrata.node.slots.clients import Holder
from kvstrata.wire import protocol as p

_ARRIVING = array("q", [p.ARRIVING]).tobytes()


class SlotState(IntEnum):
    """FILLING: bytes are on their way in. READY: published. GONE: never to be read again."""

    FILLING = 0
    READY = 1
    GONE = 2


class Slot:
    """A region of the pool with one object in it.

    ``holds`` counts those who need its bytes to stay: the one who fills it, rows that are pinned,
    writes to slower tiers. ``passed_over`` is the chunk that could not be evicted because this slot
    of it was held. ``rows`` are those it is promoted for, until that has ended; None where no
    promotion is under way. ``account`` is whose it is while it is being filled.
    """

    __slots__ = ("account", "holds", "nbytes", "offset", "order", "passed_over", "rows", "state")

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.order: str | None = None
        self.state = SlotState.FILLING
        self.holds = 0
        self.passed_over: bytes | None = None
        self.rows: list[Row] | None = None
        self.account: Account | None = None


class Row:
    """The slots of one chunk's parts, as a reader asks for them.

    Args:
        slots: one for each part, ready or being promoted.

    ``num_filling`` counts the slots still to be filled, ``num_under_way`` those whose promotion has
    not ended: past its deadline a promotion fills nothing any more, but a thread may still write.
    A row that has ``failed`` will never be whole. ``order`` is the byte order of its objects, None
    as long as there is not one for all.

    The first of its ``num_leases`` is charged to its process, the ``payer``, until the last has
    ended and no promotion for it is under way. Host memory may have it ``kept``: while it is leased
    its chunk is not evicted then, and ``passed_over`` is the chunk that was not for that reason.
    One that is ``pinned`` holds each of its slots once.
    A row of no slots stands for a chunk of which nothing is needed.
    """

    __slots__ = ("failed", "kept", "nbytes", "num_filling", "num_leases", "num_under_way",
                 "offsets", "order", "passed_over", "payer", "pinned", "slots",
                 "watchers")  # fmt: skip

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self.nbytes = sum([slot.nbytes for slot in slots])
        self.order: str | None = None
        self.failed = False
        self.num_leases = 0
        self.payer: Holder | None = None
        self.kept = self.pinned = False
        self.passed_over: bytes | None = None
        self.watchers: list[Callable[[], None]] = []
        self.offsets = b""
        self.num_filling = self.num_under_way = 0
        for slot in slots:
            if slot.rows is not None:
                slot.rows.append(self)
                self.num_under_way += 1
                self.num_filling += slot.state is SlotState.FILLING
        if not self.num_filling:
            self._complete()

    def filled(self, slot: Slot) -> None:
        """One of its slots has been filled, or will not be."""
        self.num_filling -= 1
        self.failed = self.failed or slot.state is SlotState.GONE
        if not self.num_filling and not self.failed:
            self._complete()
        if self.failed or not self.num_filling:
            watchers, self.watchers = self.watchers, []
            for tell in watchers:
                tell()

    def in_orders(self, orders: frozenset[str]) -> bool:
        """Whether a reader of these byte orders can read what is here of it."""
        if self.order in orders or self.num_filling == len(self.slots):
            return True
        return all(
            slot.order in orders for slot in self.slots if slot.state is not SlotState.FILLING
        )

    def packed_offsets(self) -> bytes:
        """Offsets of its slots as signed 64-bit numbers, `ARRIVING` for those not filled yet."""
        if self.offsets:
            return self.offsets
        if self.num_filling == len(self.slots):  # so is most of what has just been promoted
            return _ARRIVING * self.num_filling
        numbers = [p.ARRIVING if slot.order is None else slot.offset for slot in self.slots]
        return array("q", numbers).tobytes()

    def _complete(self) -> None:
        self.offsets = array("q", [slot.offset for slot in self.slots]).tobytes()
        first = self.slots[0].order if self.slots else None
        if all([slot.order == first for slot in self.slots]):
            self.order = first


def offsets_of_rows(rows: Iterable[Row], orders: frozenset[str] | None = None) -> bytes:
    """The offsets of all their slots, row by row.

    Args:
        rows: to be told of.
        orders: that the reader reads; of what has come in another one it is `ARRIVING`. None: any.
    """
    return b"".join([
        (row.offsets or row.packed_offsets())
        if orders is None or row.order in orders or row.in_orders(orders)
        else _ARRIVING * len(row.slots)
        for row in rows
    ])  # fmt: skip
