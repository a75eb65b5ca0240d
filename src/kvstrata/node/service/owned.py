"""A slower tier that this node alone writes to: its index, its byte budget, its order of use.

What it holds is known from a scan at the start and from every change since, so a match asks nobody.
The changes of one object are made one after the other. It is in the index once it is in the tier,
and out of the index before it leaves the tier (`leaving` has how); its bytes count from before
until after.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Set
from functools import partial
from typing import Any

from kvstrata.errors import TierUnavailable
from kvstrata.header import ObjectHeader
from kvstrata.node.coding.recoding import get_ready_to_decode
from kvstrata.node.common.changes import Cause
from kvstrata.node.service.carrier import HIT
from kvstrata.node.service.contents import check_contents
from kvstrata.node.service.entries import (
    UNKNOWN_TO_US,
    Orders,
    order_of,
    same_object,
    size_of,
)
from kvstrata.node.service.headers import Headers
from kvstrata.node.service.leaving import Leaving
from kvstrata.node.service.moves import Writing
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.probe import Probe
from kvstrata.node.service.puts import Stored
from kvstrata.node.service.turns import Turn
from kvstrata.node.service.uses import Uses
from kvstrata.objects import saved_s
from kvstrata.parts import identity, order_name
from kvstrata.policies.base import Policy
from kvstrata.tiers.base import Outcome, OwnedTier
from kvstrata.tiers.marks import UNKNOWN, Whose, whose_of

logger = logging.getLogger(__name__)

SLICE = 256


class OwnedBacking(Leaving):
    """An owned tier in the node's service.

    Args:
        tier: where the objects are.
        capacity_bytes: the hard bound on what it may hold.
        policy: orders its chunks for eviction.
        scrub_bytes_per_s: how fast stored objects are verified in the background; 0: never.
        others: as of `Backing`.
    """

    def __init__(
        self,
        tier: OwnedTier,
        capacity_bytes: int,
        policy: Policy,
        *,
        scrub_bytes_per_s: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__(tier, capacity_bytes, policy, **others)
        self.scrub_bytes_per_s = scrub_bytes_per_s
        self._probe = Probe(
            self.index, self._removals, self._turns, self._calls, self._scratch,
            lambda puts: self.tier.write(puts), self._fetch,
        )  # fmt: skip
        self._headers = Headers(self.index, self.tier, self._calls, self.marks)
        self._orders = Orders()
        self._uses = Uses()
        # Hears of the header of each object that was read.
        self.heard: Callable[[bytes, ObjectHeader], None] = lambda key, header: None

    # what it holds

    def find(self, key: bytes, part: int, orders: Iterable[str] | None) -> int | None:
        """See `Backing.find`. Of what a scan found the order is unknown until it is read."""
        entry = self.index.get(key, part) if self.readable else None
        if entry is None:
            return None
        return size_of(entry) if self._orders.readable(order_of(entry), orders) else None

    def has(self, key: bytes, part: int, orders: Iterable[str]) -> bool:
        """See `Backing.has`: what nobody has read may have been cleared."""
        known = not len(self.marks) or self.index.whose(key) != UNKNOWN
        return known and self.find(key, part, orders) is not None

    def cost_of(self, key: bytes) -> float:
        return self.index.cost_of(key)

    def priority_of(self, key: bytes) -> int:
        return self.index.priority_of(key)

    def use(self, keys: list[bytes]) -> None:
        self.index.touch(keys)
        self._uses.note(keys)

    def note_needs(self, keys: list[bytes], needed: Set[int], passed: Set[int]) -> None:
        self.index.note_needs(keys, needed, passed)

    def written(self, prefix: list[bytes]) -> None:
        # Written side by side they end in any order, and after the heads of earlier commits.
        self.index.touch(prefix)

    async def read_headers(self, lacks: Callable[[bytes], bool]) -> None:
        """Learn from the headers of what a scan found, of those chunks whose header is lacked."""
        keys, self._scan.keys = self._scan.keys, []
        while keys:
            try:
                await self._headers.read(keys, lacks, self._learn)
            except TierUnavailable as error:
                self.trip(error)
                await asyncio.sleep(self._health.off_s)

    # how it is

    @property
    def writable(self) -> bool:
        """Whether the tier takes new objects now; they may still wait for the scan to end."""
        return super().writable and not self.tier.read_only_reason and not self._scan.hangs

    @property
    def state(self) -> str:
        if self.readable and self.tier.read_only_reason:
            return f"read only: {self.tier.read_only_reason}"
        state = super().state
        return "scanning" if state == "ok" and not self._scan.done else state

    async def run(self) -> None:
        """Enter what an earlier process left; a tier that fails meanwhile is scanned again."""
        if self.ledger.damaged:
            logger.error("%s: its journal is damaged, so nobody knows what was cleared: all of it "
                         "counts as that", self.name)  # fmt: skip
            with contextlib.suppress(TierUnavailable):
                await self.clear()
        while True:
            try:
                await self._scan.run(self.tier.scan())
                self._all_read = not len(self.index)
                break
            except TierUnavailable as error:
                self.trip(error)
                await asyncio.sleep(self._health.off_s)
        while (names := self._removals.idle()) and await self._removals.run(names):
            pass
        logger.info("%s: %d objects, %d bytes", self.name, self.index.num_objects,
                    self.index.used_bytes)  # fmt: skip
        if self.load_target_s or (self.choice is not None and self.choice.needs_speed):
            try:
                await self._probe.run(self.writable)
            except TierUnavailable as error:
                self.trip(error)
        self._timed = True
        self._tasks.spawn("getting ready to decode", self._get_ready())

    async def _get_ready(self) -> None:
        """Compile what decodes what is here, before somebody waits for a read."""
        try:
            for family, parameters in await self._headers.codecs():
                await self._calls.encode(partial(get_ready_to_decode, family, parameters))
        except TierUnavailable as error:
            self.trip(error)

    async def upkeep(self) -> None:
        """Tell the tier what was used, and try again to delete what could not be deleted."""
        await super().upkeep()
        if not self.ledger.saved and self.readable:
            with contextlib.suppress(TierUnavailable):
                await self.save()
        used = await self._uses.take()
        try:
            while used and self.readable:
                keys = [used.popleft() for _ in range(min(len(used), SLICE))]
                ids = [identity(key, part) for key in keys for part, _ in self.index.objects(key)]
                await self._calls.call("note of use", partial(self._touch, ids))
        except TierUnavailable as error:
            self.trip(error)
        if self.readable and self._scan.done and (doomed := self._removals.idle()):
            await self._removals.run(doomed)

    def holdings(self) -> dict[str, Any]:
        return {
            "capacity_bytes": self.index.capacity_bytes,
            "used_bytes": self.index.used_bytes,
            "num_chunks": len(self.index),
            "num_objects": self.index.num_objects,
            "owners": self.index.owners.shown(),
            "pinned_bytes": self.index.pinned.nbytes,
            "num_marks": len(self.marks),
        }

    # writing

    async def _may_write(self) -> bool:
        return await self._scan.ended()

    async def _store(
        self,
        writing: Writing,
        turn: Turn,
        data: memoryview,
        order: str,
        origin: Origin,
        hang: Callable[[], None],
    ) -> bool:
        """See `Backing._store`; then it is in the index. Evicts what it must."""
        whose = whose_of(data)
        with self.quotas.taking(writing.key, whose.owner, len(data)) as may:
            if not (may and await self._make_room(len(data))):
                return False
            stored = await self._store_in_room(writing, turn, data, order, origin, whose, hang)
        self.quotas.keep_learnt(whose.owner)  # of what was here nobody may have known whose it is
        return stored

    async def _store_in_room(
        self,
        writing: Writing,
        turn: Turn,
        data: memoryview,
        order: str,
        origin: Origin,
        whose: Whose,
        hang: Callable[[], None],
    ) -> bool:
        (name,), nbytes, outcome = turn.names, len(data), Outcome.MISS
        writing.claimed = nbytes
        try:
            if writing.wanted and self.writable:
                outcome = Outcome.FAILED
                stored = Stored(identity(*name), data, self.tier.epoch, if_absent=False)
                outcome = await self._puts.put(stored, hang)
        except TierUnavailable as error:
            self.trip(error)
        finally:
            writing.claimed = 0
            if outcome is not HIT:
                self.index.unclaim(nbytes)
        if outcome is not HIT:
            if outcome is Outcome.FAILED:
                # Nobody knows what a write that failed has left of the object that was there.
                self._removals.condemn(*name, Cause.LOST)
            self._counters.add("tier_writes_total", tier=self.name, outcome="failed")
            return False
        self._health.wrote()
        self._removals.gone(*name)
        if not (writing.wanted and self.index.takes(writing.key, whose.owner)) or (
            self.marks.covers_page(data)
        ):
            self._removals.add(*name, nbytes)
            await self._removals.run_in(turn, give_up=hang)
            return False
        self._counters.add("tier_writes_total", tier=self.name, outcome="hit")
        self._counters.add("tier_write_bytes_total", nbytes, tier=self.name)
        (entry,) = self._entries([nbytes], self._orders.number(order))
        self._mixed = self._mixed or self.index.whose(name[0]) not in (UNKNOWN, whose)
        cost = saved_s(data, origin.cost, alone=writing.key not in self.index)
        self.index.put(*name, entry, cost, whose, origin.priority)
        return True

    # reading

    def _seen(self, key: bytes, part: int) -> int | None:
        return self.index.get(key, part)

    def _stands(self, key: bytes, part: int, seen: Any) -> bool:
        return same_object(self.index.get(key, part), seen)

    def _leave(self, key: bytes, part: int, seen: Any) -> None:
        entry = self.index.get(key, part)
        if entry is not None and same_object(entry, seen):
            self.index.amend(key, part, entry | UNKNOWN_TO_US)

    def _learn(self, key: bytes, part: int, header: ObjectHeader) -> None:
        # Only of what a scan found the order is not known; what takes its place has one.
        whose = Whose(header.owner, header.namespace)
        self.index.learn(key, whose)
        self._mixed = self._mixed or self.index.whose(key) not in (UNKNOWN, whose)
        entry = self.index.get(key, part)
        if entry is not None and not order_of(entry):
            order = self._orders.number(order_name(header.kind, header.order))
            self.index.amend(key, part, entry | order)
        self.quotas.keep_learnt(header.owner)
        if entry is not None:
            self.heard(key, header)

    # how

    def _touch(self, ids: list[bytes]) -> None:
        for start in range(0, len(ids), self.tier.limits.batch_objects):
            self.tier.touch(ids[start : start + self.tier.limits.batch_objects])

    def _when_off(self) -> None:
        self._scan.let_go()

    # laws

    def check_contents(self) -> None:
        """Likewise, while nothing is under way, unless all that the tier holds is known and counts.

        Blocks for a scan of the tier.
        """
        if self._scan.done and not (self._writes or len(self._turns)):
            check_contents(self.tier, self.index, self._removals)
