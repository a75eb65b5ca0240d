"""The node's canary: does each tier give back what it is given?

Now and then a chunk of random bytes is stored in each tier, read back, compared and removed, by the
way of all objects there: codec, encryption, checksums, deadlines. One that does not come back is
said once, with what to do, until one does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvstrata.canaries import ORDER, PART, Canaries
from kvstrata.errors import TierUnavailable
from kvstrata.header import NOBODY
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.common.background import Tasks
from kvstrata.node.common.changes import Cause
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.origin import Origin
from kvstrata.node.slots.host import HostMemory
from kvstrata.objects import stored_bytes
from kvstrata.observe.counters import Counters
from kvstrata.tiers.marks import Whose

logger = logging.getLogger(__name__)

PAYLOAD_BYTES = 4096
TRIES = 2
"""A clear, or an eviction, may take the first one away."""

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


class Failed(Exception):
    """A canary did not come back; says why."""


class Canary:
    """Canaries for a node's tiers; lives on its loop.

    Args:
        host: host memory.
        backings: the slower tiers; those that take no writes have none.
        counters: the node's.
    """

    def __init__(self, host: HostMemory, backings: Sequence[Backing], counters: Counters) -> None:
        #: whether the last one came back, by tier
        self.came_back: dict[str, bool] = {}
        self._host = host
        self._backings = {one.name: one for one in backings if one.takes_writes}
        self._counters = counters
        self._chunks = Canaries(os.urandom(32), 1, PAYLOAD_BYTES)
        self._nbytes = stored_bytes(PAYLOAD_BYTES)
        self._scratch = Scratch(2 * len(self._backings))

    def start(self, every_s: float, tasks: Tasks) -> None:
        """Send one to each tier from now on (0: none); a tier that hangs holds up no other's."""
        for tier in ("host", *self._backings) if every_s else ():
            tasks.spawn(f"the canary of {tier}", self._run(tier, every_s))

    async def send(self, tier: str) -> str:
        """Send one to a tier; what became of it: ``ok``, ``failed``, or ``skipped``.

        Skipped are tiers that are being scanned, or that this node may only read.
        """
        backing = self._backings.get(tier)
        if backing is not None and backing.state.startswith(("scanning", "read only")):
            self._counters.add("canaries_total", tier=tier, outcome=SKIPPED)
            return SKIPPED
        problem = ""
        for _ in range(TRIES):
            try:
                if backing is None:
                    self._through_host()
                else:
                    await self._through(backing)
            except (Failed, TierUnavailable) as error:
                problem = str(error)
            else:
                problem = ""
                break
        self._tell(tier, problem)
        return FAILED if problem else OK

    async def _run(self, tier: str, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self.send(tier)

    def _through_host(self) -> None:
        """Synchronous, so that nothing can come between."""
        (key,), host = self._chunks.keys, self._host
        with self._taking("host", "store"):
            slot = host.allocate(self._nbytes)
            if slot is None:
                raise Failed("there is no room: everything in host memory is leased")
            view = host.pool.view(slot.offset, slot.nbytes)
            self._chunks.write(0, view)
            host.publish(key, PART, slot, ORDER)
        try:
            with self._taking("host", "read"):
                if host.get(key, PART) is not slot or not self._chunks.is_right(0, view):
                    raise Failed("OTHER bytes came back: the machine's memory may be failing")
        finally:
            with self._taking("host", "remove"):
                host.drop(key, Cause.CLEARED)
                host.unhold(slot)

    async def _through(self, backing: Backing) -> None:
        (key,), tier = self._chunks.keys, backing.name
        origin = Origin([key], PART, ORDER, namespace=self._chunks.namespace)
        buffers = [self._scratch.take(self._nbytes) for _ in range(2)]
        given, back = (memoryview(buffer)[: self._nbytes] for buffer in buffers)
        try:
            # Behind every clear that its tier keeps in mind.
            date = backing.marks.date(Whose(NOBODY, self._chunks.namespace), time.time_ns())
            self._chunks.write(0, given, date)
            back[:] = bytes(self._nbytes)
            with self._taking(tier, "store"):
                if not await backing.write(key, given, origin):
                    raise Failed(f"it was not stored, the tier is {backing.state}")
            try:
                with self._taking(tier, "read"):
                    stored = backing.find(key, PART, None)
                    size = self._nbytes if stored is None else stored
                    if await backing.read(key, PART, size, back) is None:
                        raise Failed(f"it did not come back, the tier is {backing.state}")
                if not self._chunks.is_right(0, back):
                    raise Failed("OTHER bytes came back")
            finally:
                with self._taking(tier, "remove"):
                    await backing.drop([key])
        finally:
            for buffer in buffers:
                self._scratch.give(buffer)

    @contextmanager
    def _taking(self, tier: str, verb: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        taken = time.perf_counter() - begun
        self._counters.observe("canary_seconds", taken, tier=tier, verb=verb)

    def _tell(self, tier: str, problem: str) -> None:
        before = self.came_back.get(tier, True)
        self.came_back[tier] = not problem
        self._counters.add("canaries_total", tier=tier, outcome=FAILED if problem else OK)
        if problem and before:
            logger.error(
                "the canary of %s has not come back: %s. Requests go on without that tier where it "
                "fails them, too; `kvstrata status` says how it is, `kvstrata doctor` tries the "
                "whole way of an object, docs/troubleshooting.md has the remedies", tier, problem,
            )  # fmt: skip
        elif not problem and not before:
            logger.info("the canary of %s comes back again", tier)
