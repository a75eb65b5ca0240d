"""What is known of the objects of one commit on their way into slower tiers."""

from __future__ import annotations

from typing import NamedTuple

from kvstrata.node.slots.reservations import Reservation


class Origin(NamedTuple):
    """What the objects of one commit share.

    Args:
        prefix: keys of the prompt's chunks up to the last one of the commit.
        part: which object of each chunk.
        order: as readers will ask for it, see `kvstrata.parts.order_name`.
        cost: what computing a chunk took, in seconds; 0: unknown.
        weights: what computed it, see `kvstrata.wire.client.NodeClient.reserve`.
        namespace: what it belongs to, 32 bytes; empty: unknown.
        trace: traceparent of the store, where it is traced.
        priority: as of `kvstrata.policies.base.Policy.insert`.
        tiers: names of those that may have it; none: all.
        is_tail: whether it is shorter than a chunk, and found by its marks alone.
    """

    prefix: list[bytes]
    part: int
    order: str
    cost: float = 0.0
    weights: str = ""
    namespace: bytes = b""
    trace: str = ""
    priority: int = 0
    tiers: frozenset[str] = frozenset()
    is_tail: bool = False

    @classmethod
    def of(cls, reservation: Reservation, last: bytes) -> Origin:
        """What a reservation says of its chunks up to this one."""
        return cls(
            reservation.prefix[: reservation.prefix.index(last) + 1],
            reservation.part,
            reservation.order,
            reservation.cost,
            reservation.weights,
            reservation.namespace,
            reservation.trace,
            reservation.priority,
            reservation.tiers,
            reservation.is_tail,
        )
