"""The background scrub: read what lies in a slower tier at a bounded rate, and verify it."""

from __future__ import annotations

import asyncio
import mmap

from kvstrata.node.backing import Backing

IDLE_S = 60.0


async def scrub(backing: Backing, bytes_per_s: float) -> None:
    """Verify the tier's objects one after the other, for ever; what fails is taken out of service.

    Args:
        backing: the tier.
        bytes_per_s: the rate that is not exceeded on average.
    """
    scratch = mmap.mmap(-1, 1 << 20)
    while True:
        objects = [
            (key, part, nbytes)
            for key in list(backing.index.keys())
            for part, nbytes in backing.index.objects(key)
        ]
        for key, part, nbytes in objects:
            if backing.readable and backing.index.get(key, part) == nbytes:
                if len(scratch) < nbytes:
                    scratch = mmap.mmap(-1, nbytes)
                await backing.read(key, part, nbytes, memoryview(scratch)[:nbytes])
                await asyncio.sleep(nbytes / bytes_per_s)
        await asyncio.sleep(IDLE_S)
