"""The answer to whoever waits for the chunks of a lease."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial

from kvstrata.errors import UsageError
from kvstrata.node.slots.leases import LeaseTable
from kvstrata.wire import protocol as p

MAX_WAITING = 1024
"""For the chunks of one lease at once: ranks of an engine, and some."""


def arrival(leases: LeaseTable, message: p.Await) -> p.Arrived | Awaitable[p.Reply]:
    """Answer when more chunks of a lease are in host memory, or one will not come.

    Backwards it is the chunks right before one, and the one before those.

    Raises:
        UsageError: there is no such lease, or too many wait for it.
    """
    lease, have = leases.get(message.lease), message.have
    if lease is None:
        raise UsageError(f"there is no lease {message.lease}")
    if have < 0:
        raise UsageError(f"nobody has {have} chunks")

    if message.backwards and lease.shape:
        raise UsageError("what is of use only as a whole is not brought from its end")

    def arrived() -> p.Arrived:
        if message.backwards:
            first = lease.first_before(have)
            failed = lease.fails_before(first)
            return p.Arrived(message.id, first, failed, lease.offsets(first, have))
        offsets = lease.offsets(have, lease.ready)
        return p.Arrived(message.id, lease.ready, lease.failed, offsets)

    settled = partial(lease.settled_before if message.backwards else lease.settled, have)
    if settled():
        return arrived()
    if len(lease.listeners) >= MAX_WAITING:
        raise UsageError(f"{MAX_WAITING} wait for lease {lease.id} already")
    future: asyncio.Future[p.Reply] = asyncio.get_running_loop().create_future()

    def tell() -> None:
        if not future.done():
            future.set_result(arrived())

    lease.listeners.append((settled, tell))
    return future
