"""The background scrub: read what lies in a slower tier at a bounded rate, and verify it."""

from __future__ import annotations

import asyncio
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstrata.node.service.backing import Backing

IDLE_S = 60.0


async def scrub(backing: Backing, bytes_per_s: float) -> None:
    """Verify the tier's objects one after the other, for ever; what fails is taken out of service.

    Args:
        backing: the tier.
        bytes_per_s: the rate that is not exceeded on average.
    """
    scratch = mmap.mmap(-1, 1 << 20)  # aligned, as a tier wants its buffers
    while True:
        for key in list(backing.index.keys()):
            for part, _ in list(backing.index.objects(key)):
                while not backing.readable:
                    await asyncio.sleep(IDLE_S)
                nbytes = backing.find(key, part, None)
                if nbytes is None:
                    continue
                if len(scratch) < nbytes:
                    scratch = mmap.mmap(-1, nbytes)
                await backing.verify(key, part, nbytes, memoryview(scratch)[:nbytes])
                await asyncio.sleep(nbytes / bytes_per_s)
        await asyncio.sleep(IDLE_S)
