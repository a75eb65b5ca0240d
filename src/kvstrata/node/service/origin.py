"""What is known of the objects of one commit on their way into slower tiers."""

from __future__ import annotations

from typing import NamedTuple


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
    """

    prefix: list[bytes]
    part: int
    order: str
    cost: float = 0.0
    weights: str = ""
    namespace: bytes = b""
    trace: str = ""
