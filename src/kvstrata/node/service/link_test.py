"""How fast a shared store is, by a look at it before that matters."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial

from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.names import Where
from kvstrata.node.service.probe import PROBE_BYTES, PROBE_READS
from kvstrata.objects import HEADER_BYTES
from kvstrata.tiers.base import Put, SharedTier


class LinkTest:
    """Writes an object of no chunk, reads it in all threads at once, and removes it.

    Args:
        calls: into the tier.
        tier: the store.
        scratch: buffers.
        fetch: reads an object into a buffer, and measures.
    """

    def __init__(
        self,
        calls: TierCalls,
        tier: SharedTier,
        scratch: Scratch,
        fetch: Callable[[bytes, memoryview], object],
    ) -> None:
        self._calls = calls
        self._tier = tier
        self._scratch = scratch
        self._fetch = fetch

    async def run(self, epoch: int) -> None:
        """Do it once.

        Raises:
            TierUnavailable: that failed.
        """
        # Nobody else's: nodes that start together must not remove it under each other.
        name = Where(epoch, bytes(32), "link test").name(os.urandom(32), 0)

        def write() -> None:
            with self._scratch.buffer(PROBE_BYTES) as data:
                data[:] = os.urandom(PROBE_BYTES)
                self._tier.write([Put(name, data[:HEADER_BYTES], data[HEADER_BYTES:])])

        def read() -> None:
            with self._scratch.buffer(PROBE_BYTES) as into:
                self._fetch(name, into)

        await self._calls.call("write", write)
        try:
            reads = [self._calls.read(read) for _ in range(PROBE_READS)]
            for failure in await asyncio.gather(*reads, return_exceptions=True):
                if failure is not None:
                    raise failure
        finally:
            await self._calls.call("removal", partial(self._tier.delete, [name]))
