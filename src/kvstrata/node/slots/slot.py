"""A slot: a region of the pool with one object in it, and who needs it still."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from kvstrata.node.slots.clients import Client


class SlotState(IntEnum):
    """FILLING: bytes are on their way in. READY: published. GONE: never to be read again."""

    FILLING = 0
    READY = 1
    GONE = 2


class Slot:
    """A region of the pool with one object in it.

    ``holds`` counts those who need its bytes to stay: the one who fills it, leases, writes to
    slower tiers. ``waiters`` are called when it is filled or has failed.
    Of its ``num_leases`` the first is charged to its client, the ``payer``, until the last ends.
    ``passed_over`` is the chunk that could not be evicted because this slot of it was held.
    """

    __slots__ = ("holds", "nbytes", "num_leases", "offset", "order", "passed_over", "payer",
                 "state", "waiters")  # fmt: skip

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.order: str | None = None
        self.state = SlotState.FILLING
        self.holds = 0
        self.num_leases = 0
        self.payer: Client | None = None
        self.passed_over: bytes | None = None
        self.waiters: list[Callable[[], None]] | None = None
