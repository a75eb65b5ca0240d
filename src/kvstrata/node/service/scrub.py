"""The background scrub: read what lies in a slower tier at a bounded rate, and verify it."""

from __future__ import annotations

import asyncio

from kvstrata.node.service.owned import OwnedBacking

IDLE_S = 60.0


async def scrub(backing: OwnedBacking) -> None:
    """Verify the tier's objects one after the other, for ever; what fails is taken out of service.

    Args:
        backing: the tier; its ``scrub_bytes_per_s`` is not exceeded on average, and may change.
    """
    while True:
        marks, all_read = backing.settled_marks(), backing.scrub_bytes_per_s > 0
        for key in list(backing.index.keys()) if backing.scrub_bytes_per_s else []:
            for part, _ in list(backing.index.objects(key)):
                while not (backing.readable and backing.scrub_bytes_per_s):
                    await asyncio.sleep(IDLE_S)
                nbytes = backing.find(key, part, None)
                if nbytes is None:
                    all_read = all_read and backing.index.get(key, part) is None
                else:
                    known = await backing.verify(key, part, nbytes)
                    all_read = all_read and (bool(known) or backing.index.get(key, part) is None)
                    await asyncio.sleep(nbytes / (backing.scrub_bytes_per_s or nbytes))
        under_way = set(backing.under_way)
        await asyncio.sleep(IDLE_S)
        if all_read:
            backing.passed(marks, under_way)
