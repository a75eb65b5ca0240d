"""What an earlier process left in an owned tier, entered into the index in slices.

Requests are served meanwhile; only writes wait, since before its end nobody knows what the tier
holds already.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator

from kvstrata.node.common.index import Index
from kvstrata.node.common.slices import HOLD_S
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.probe import PROBE_KEY
from kvstrata.node.service.removals import Removals
from kvstrata.node.service.turns import Name
from kvstrata.parts import named
from kvstrata.tiers.base import Found

SLICE = 32
"""Objects that are entered together; after them others may have their turn."""


class Scan:
    """The scan of one tier, as often as it takes.

    Args:
        index: to enter objects into.
        removals: what is to go again.
        calls: into the tier.
        entries: index entries for objects of these sizes.
        make_room: evicts for so many bytes and claims them; False if it cannot.
    """

    def __init__(
        self,
        index: Index[int],
        removals: Removals,
        calls: TierCalls,
        entries: Callable[[Iterable[int]], list[int]],
        make_room: Callable[[int], Awaitable[bool]],
    ) -> None:
        self.done = False
        self.hangs = False
        #: chunks that were found and not known, the last used last
        self.keys: list[bytes] = []
        #: what was found after its chunk had been forgotten, and is to go: by chunk
        self.struck: dict[bytes, list[Name]] = {}
        self._index = index
        self._removals = removals
        self._calls = calls
        self._entries = entries
        self._make_room = make_room
        self._num_clears = 0
        self._forgotten = {PROBE_KEY}
        self._waiting: set[asyncio.Future[None]] = set()

    async def run(self, batches: Iterator[list[Found]]) -> None:
        """Enter what a tier's scan yields.

        Raises:
            TierUnavailable: it broke off; to be begun again.
        """
        clears = self._num_clears
        while (batch := await self._next(batches)) is not None:
            stop = time.perf_counter() + HOLD_S
            for start in range(0, len(batch), SLICE):
                few = batch[start : start + SLICE]
                here = (named(found.object_id)[0] for found in few)
                self.keys.extend(dict.fromkeys(key for key in here if key not in self._index))
                if not self._enter(few, clears):
                    for found in few:
                        if not self._enter([found], clears):
                            await self._enter_or_remove(found, clears)
                if time.perf_counter() >= stop:
                    await asyncio.sleep(0)
                    stop = time.perf_counter() + HOLD_S
        self.done = True
        self._forgotten.clear()
        self.let_go()

    async def ended(self) -> bool:
        """Wait for the end; False if that will take long, or the tier is switched off."""
        if not self.done and not self.hangs:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            await waiting
        return self.done

    def let_go(self) -> None:
        """Wait no longer, whoever does."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    def forget(self, keys: Iterable[bytes] | None) -> None:
        """Enter nothing of these chunks any more (None: of all that was there until now)."""
        if keys is None:
            self._num_clears += 1
        elif not self.done:
            self._forgotten.update(keys)

    async def _next(self, batches: Iterator[list[Found]]) -> list[Found] | None:
        def hang() -> None:
            self.hangs = True
            self.let_go()

        try:
            return await self._calls.call("step of the scan", lambda: next(batches, None), hang)
        finally:
            self.hangs = False

    def _enter(self, few: list[Found], clears: int) -> bool:
        """Index what a scan found that began after so many clears; False: there is more to it."""
        names = [named(found.object_id) for found in few]
        if clears != self._num_clears or not self._forgotten.isdisjoint([key for key, _ in names]):
            return False
        here = zip(names, self._entries(found.nbytes for found in few), strict=True)
        return self._index.adopt([one for one in here if one[0] not in self._removals])

    async def _enter_or_remove(self, found: Found, clears: int) -> None:
        """Make room for what a scan found and index it, or see to its removal."""
        name = key, part = named(found.object_id)
        nbytes = found.nbytes
        if self._index.get(key, part) is not None or name in self._removals:
            return
        room = self._wanted(key, clears) and await self._make_room(nbytes)
        if room and self._wanted(key, clears):
            (entry,) = self._entries([nbytes])
            self._index.put(key, part, entry)
            return
        # Cleared while the scan ran, or beyond a budget smaller than last time's.
        if not room:
            self._index.claim_existing(nbytes)
        self._removals.add(key, part, nbytes)
        if key in self._forgotten:
            self.struck.setdefault(key, []).append((key, part))

    def _wanted(self, key: bytes, clears: int) -> bool:
        return clears == self._num_clears and key not in self._forgotten
