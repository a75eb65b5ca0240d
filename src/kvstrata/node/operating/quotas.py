"""Quotas: what an owner may have in a tier of the node's own; beyond it the owner's own goes first.

A quota lives with the tier, in its journal. That of host memory lives in a file beside the node's
socket: it belongs to the node and not to a configuration, which says nothing of single tenants.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from kvstrata.errors import UsageError
from kvstrata.header import NOBODY
from kvstrata.node.common.index import Index
from kvstrata.node.common.slices import in_slices
from kvstrata.node.operating.pinning import checked_owner
from kvstrata.node.service.ledger import MAX_QUOTAS, Keeping, Quota
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.slots.host import HostMemory
from kvstrata.wire import protocol as p

EVICT_SLICE = 8


class Quotas:
    """The quotas of a node.

    Args:
        host: host memory.
        keeping: where host memory's are.
        backings: the slower tiers that are the node's own.
    """

    def __init__(self, host: HostMemory, keeping: Keeping, backings: list[OwnedBacking]) -> None:
        self._host = host
        self._ledger = keeping.ledger
        self._keeping = keeping
        self._ordering = asyncio.Lock()
        self._backings = {backing.name: backing for backing in backings}
        for owner, nbytes in self._ledger.quotas.items():
            host.index.set_quota(owner, nbytes)
        for backing in backings:
            for owner, nbytes in backing.ledger.quotas.items():
                backing.index.set_quota(owner, nbytes)

    def set(self, message: p.Quota) -> Awaitable[p.Done]:
        """Let an owner have so many bytes in a tier; what is too much goes, as far as it may.

        Awaiting it raises:
            TierUnavailable: it holds, and could not be written down.
        """
        owner, nbytes = checked_owner(message.owner), message.nbytes
        if owner == NOBODY:
            raise UsageError("what is nobody's has no quota")
        if nbytes is not None and not 0 <= nbytes < 1 << 62:
            raise UsageError(f"{nbytes} bytes are no quota")
        backing = self._backings.get(message.tier)
        if backing is None and message.tier != "host":
            names = sorted(("host", *self._backings))
            raise UsageError(f"no quota in {message.tier!r}; the node's own tiers are {names}")
        ledger = self._ledger if backing is None else backing.ledger
        if nbytes is not None and owner not in ledger.quotas and len(ledger.quotas) >= MAX_QUOTAS:
            raise UsageError(f"there are {MAX_QUOTAS} quotas, which is all there may be")
        ledger.note(Quota(owner, nbytes))
        return self._set(message, backing)

    async def _set(self, message: p.Quota, backing: OwnedBacking | None) -> p.Done:
        index: Index[Any] = self._host.index if backing is None else backing.index
        keep = self._host.quotas.keep_to_quota if backing is None else backing.quotas.keep_to_quota
        account = index.set_quota(message.owner, message.nbytes)
        if message.nbytes is not None:
            async with self._ordering:
                ordered = in_slices(index.order_for_quota(account))
                if ordered is not None:
                    await ordered
            while keep(account, EVICT_SLICE):
                await asyncio.sleep(0)
        if backing is None:
            await self._keeping.save(asyncio.to_thread)
        else:
            await backing.save()
        return p.Done(message.id, account.used_bytes)
