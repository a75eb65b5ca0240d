"""A node's metrics at one moment: what was counted, and how things stand.

Only numbers are gathered here, on the node's loop; whoever asked makes text of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import kvstrata
from kvstrata.node.common.index import Index
from kvstrata.node.operating.canary import Canary
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.movement import Movement
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import LeaseTable
from kvstrata.node.slots.reservations import ReservationTable
from kvstrata.observe.counters import Counters, Value
from kvstrata.wire import operating as o

STATES = ("ok", "scanning", "waiting", "read only", "off")
"""How a tier's state begins, in words."""


class Measures:
    """Gathers a node's metrics.

    Args:
        counters: the node's.
        host: host memory.
        leases: of its slots.
        reservations: likewise.
        movement: the queues.
        backings: the slower tiers.
        canary: the node's.
        kept_bytes: what is kept for other nodes now.
        uptime_s: since the node started.
        num_pins: that hold now.
    """

    def __init__(
        self,
        counters: Counters,
        host: HostMemory,
        leases: LeaseTable,
        reservations: ReservationTable,
        movement: Movement,
        backings: Sequence[Backing],
        canary: Canary,
        kept_bytes: Callable[[], int],
        uptime_s: Callable[[], float],
        num_pins: Callable[[], int],
    ) -> None:
        self._counters = counters
        self._host = host
        self._leases = leases
        self._reservations = reservations
        self._movement = movement
        self._backings = backings
        self._kept_bytes = kept_bytes
        self._uptime_s = uptime_s
        self._num_pins = num_pins
        self._canary = canary
        self.of_fleet: Callable[[], Iterable[Value]] = tuple
        """Of the node's fleet, if it is in one."""

    def answer(self, client: Client, message: o.Metrics) -> o.Measured:
        """All of it, as numbers."""
        return o.Measured(
            message.id,
            [o.Value(*value) for value in (*self._counters.values(), *self._gauges())],
            [
                o.Distribution(one.name, one.labels, list(one.bounds), one.counts, one.sum)
                for one in self._counters.distributions()
            ],
        )

    def _gauges(self) -> Iterator[Value]:
        host = self._host
        yield Value("node_info", {"release": kvstrata.__version__}, 1)
        yield Value("uptime_seconds", {}, self._uptime_s())
        yield from self.of_fleet()
        yield Value("host_capacity_bytes", {}, host.pool.capacity_bytes)
        yield Value("host_used_bytes", {}, host.allocated_bytes)
        yield Value("host_populated_bytes", {}, host.pool.populated_bytes)
        yield Value("host_chunks", {}, len(host.index))
        yield Value("leases", {}, len(self._leases))
        yield Value("leased_bytes", {}, self._leases.leased_bytes)
        yield Value("reservations", {}, len(self._reservations))
        yield Value("kept_bytes", {}, self._kept_bytes())
        yield Value("pins", {}, self._num_pins())
        yield from _of_owners("host", host.index)
        for tier, came_back in self._canary.came_back.items():
            yield Value("canary_ok", {"tier": tier}, int(came_back))
        queued = {behind.backing.name: behind.queued_bytes for behind in self._movement.behind}
        for backing in self._backings:
            yield from self._of_tier(backing, queued.get(backing.name, 0))

    def _of_tier(self, backing: Backing, queued_bytes: int) -> Iterator[Value]:
        tier = {"tier": backing.name}
        state = backing.state
        for one in STATES:
            yield Value("tier_state", {**tier, "state": one}, int(state.startswith(one)))
        holdings = backing.holdings()
        for name, known in (
            ("tier_capacity_bytes", "capacity_bytes"),
            ("tier_used_bytes", "used_bytes"),
            ("tier_chunks", "num_chunks"),
        ):
            if known in holdings:
                yield Value(name, tier, holdings[known])
        loading = self._movement.link(backing).queued_bytes
        yield Value("tier_queued_bytes", {**tier, "direction": "write"}, queued_bytes)
        yield Value("tier_queued_bytes", {**tier, "direction": "read"}, loading)
        for lane, count in backing.calls_under_way().items():
            yield Value("tier_calls", {**tier, "lane": lane}, count)
        yield Value("tier_scratch_bytes", tier, backing.scratch_bytes)
        yield Value("marks", tier, len(backing.marks))
        if isinstance(backing, OwnedBacking):
            yield from _of_owners(backing.name, backing.index)


def _of_owners(name: str, index: Index[Any]) -> Iterator[Value]:
    tier = {"tier": name}
    yield Value("pinned_bytes", tier, index.pinned.nbytes)
    yield Value("quotas", tier, index.owners.num_quotas)
    yield Value("owners", tier, len(index.owners))
