"""What an operator says of tenants: what is kept for them, what they may have, what is cleared."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvstrata.config import PinConfig
from kvstrata.node.operating.clearing import Clearer, Clearing
from kvstrata.node.operating.operations import Operations
from kvstrata.node.operating.pinning import Pinning
from kvstrata.node.operating.quotas import Quotas
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.ledger import Keeping, Ledger
from kvstrata.node.service.movement import Movement
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.reservations import ReservationTable
from kvstrata.observe.counters import Counters
from kvstrata.tiers.journal import Journal
from kvstrata.wire import protocol as p

Answer = p.Reply | Awaitable[p.Reply]


class Tenants:
    """Pins, quotas and clears of one node.

    Args:
        host: host memory.
        reservations: what is being written to it.
        movement: what is on its way between it and the slower tiers.
        operations: what jobs have on its way.
        backings: the slower tiers.
        bounds: on what may be pinned.
        journal: where outlives the process what is said of host memory, and of tiers that are not
            the node's own.
        counters: the node's.
        wall: nanoseconds since 1970, by the clock that dates go by.
    """

    def __init__(
        self,
        host: HostMemory,
        reservations: ReservationTable,
        movement: Movement,
        operations: Operations,
        backings: Sequence[Backing],
        bounds: PinConfig,
        journal: Journal,
        counters: Counters,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        own = [one for one in backings if isinstance(one, OwnedBacking)]
        self.pinning = Pinning(host, backings, bounds.per_tenant, bounds.total, counters)
        clearer = Clearer(host, reservations, movement, operations, backings)
        keeping = Keeping(Ledger(journal), "host")
        self.clearing = Clearing(clearer, self.pinning, backings, keeping, wall)
        self.quotas = Quotas(host, keeping, own)

    @property
    def handlers(self) -> dict[type, Callable[[Client, Any], Answer]]:
        """Who answers which message."""
        return {
            p.Pin: lambda client, message: self.pinning.pin(message),
            p.Unpin: lambda client, message: self.pinning.unpin(message),
            p.Pins: lambda client, message: self.pinning.page(message),
            p.Quota: lambda client, message: self.quotas.set(message),
        }
