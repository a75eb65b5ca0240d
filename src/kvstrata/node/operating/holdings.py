"""What a node holds in bytes and numbers, tier by tier, for its status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstrata.node.service.backing import Backing
from kvstrata.node.service.movement import Movement
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import LeaseTable
from kvstrata.node.slots.reservations import ReservationTable


def holdings(
    host: HostMemory,
    policy: str,
    leases: LeaseTable,
    reservations: ReservationTable,
    movement: Movement,
    backings: Sequence[Backing],
) -> dict[str, Any]:
    """Of host memory, whose policy has this name, what clients hold of it, and the slower tiers."""
    queued = {behind.backing.name: behind.queued_bytes for behind in movement.behind}
    return {
        "host": {
            "capacity_bytes": host.pool.capacity_bytes,
            "allocated_bytes": host.allocated_bytes,
            "populated_bytes": host.pool.populated_bytes,
            "num_chunks": len(host.index),
            "num_objects": host.index.num_objects,
            "num_evicted": host.num_evicted,
            "policy": policy,
            "owners": host.index.owners.shown(),
            "pinned_bytes": host.index.pinned.nbytes,
        },
        "leases": {
            "count": len(leases),
            "bytes": leases.leased_bytes,
            "reservations": len(reservations),
        },
        "tiers": [
            {
                "name": backing.name,
                "codec": backing.choice.name if backing.choice else "raw",
                "state": backing.state,
                **backing.holdings(),
                "queued_bytes": queued.get(backing.name, 0),
                "scratch_bytes": backing.scratch_bytes,
            }
            for backing in backings
        ],
    }
