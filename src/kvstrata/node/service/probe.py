"""How fast a tier is, by a look at it before that matters."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from functools import partial

from blake3 import blake3

from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.common.index import Index
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.entries import size_of
from kvstrata.node.service.removals import Removals
from kvstrata.node.service.turns import Turns
from kvstrata.objects import HEADER_BYTES
from kvstrata.parts import identity
from kvstrata.tiers.base import Put

PROBE_BYTES, PROBE_READS = 1 << 20, 16
PROBE_KEY = blake3(b"kvstrata probe").digest()
"""Of an object of no chunk; one that a node left which ended meanwhile goes at the next scan."""


class Probe:
    """Reads a little of a tier in all of its threads, while nobody waits.

    Args:
        index: of the tier.
        removals: from the tier.
        turns: of its objects.
        calls: into the tier.
        scratch: buffers.
        write: the tier's verb.
        fetch: reads an object into a buffer, and measures.
    """

    def __init__(
        self,
        index: Index[int],
        removals: Removals,
        turns: Turns,
        calls: TierCalls,
        scratch: Scratch,
        write: Callable[[list[Put]], object],
        fetch: Callable[[bytes, memoryview], object],
    ) -> None:
        self._index = index
        self._removals = removals
        self._turns = turns
        self._calls = calls
        self._scratch = scratch
        self._write = write
        self._fetch = fetch

    async def run(self, writable: bool) -> None:
        """Read objects that are there, or one of no chunk where they are few and small.

        Raises:
            TierUnavailable: that failed.
        """
        known = [
            (identity(key, part), size_of(entry))
            for key in itertools.islice(self._index.keys(), PROBE_READS)
            for part, entry in self._index.objects(key)
        ][:PROBE_READS]
        few = sum(nbytes for _, nbytes in known) < PROBE_READS * PROBE_BYTES // 4
        room = self._index.used_bytes + 4 * PROBE_BYTES <= self._index.capacity_bytes
        if few and room and writable and self._index.claim(PROBE_BYTES):
            await self._read_what_is_written()
        else:
            await self._read(known)

    async def _read_what_is_written(self) -> None:
        # It counts from before it is there until it has gone.
        self._removals.add(PROBE_KEY, 0, PROBE_BYTES)
        name = identity(PROBE_KEY, 0)

        def write() -> None:
            with self._scratch.buffer(PROBE_BYTES) as data:
                data[:] = os.urandom(PROBE_BYTES)
                self._write([Put(name, data[:HEADER_BYTES], data[HEADER_BYTES:])])

        with self._turns.take([(PROBE_KEY, 0)]) as turn:
            await self._calls.call("write", write, turn.hang)
            try:
                await self._read([(name, PROBE_BYTES)] * PROBE_READS)
            finally:
                await self._removals.run_in(turn, give_up=turn.hang)

    async def _read(self, objects: list[tuple[bytes, int]]) -> None:
        """Read these side by side, for the time that it takes."""

        def work(name: bytes, nbytes: int) -> None:
            with self._scratch.buffer(nbytes) as into:
                self._fetch(name, into)

        reads = [self._calls.read(partial(work, *one)) for one in objects]
        for failure in await asyncio.gather(*reads, return_exceptions=True):
            if failure is not None:
                raise failure
