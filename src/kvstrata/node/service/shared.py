"""A slower tier that a fleet writes to: hints of what it holds, and no budget of the node's.

Nobody here knows what such a store holds, so a match asks it, and takes what it answers in time.
What was heard stays a hint for a while: a read of what has gone since is a miss. Capacity and
eviction are the store's own. What others have written already is not written again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

from kvstrata.errors import ReadOnly, TierUnavailable
from kvstrata.header import ObjectHeader
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.standing import alone
from kvstrata.node.service.asking import Asking
from kvstrata.node.service.backing import Question
from kvstrata.node.service.calls import nothing
from kvstrata.node.service.carrier import HIT
from kvstrata.node.service.hints import Hints
from kvstrata.node.service.link_test import LinkTest
from kvstrata.node.service.moves import Writing
from kvstrata.node.service.names import Seen, Where
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.presence import Presence
from kvstrata.node.service.puts import Stored
from kvstrata.node.service.single import Singly
from kvstrata.node.service.turns import Turn
from kvstrata.node.service.uses import Uses
from kvstrata.node.service.weeding import Weeding
from kvstrata.objects import HEADER_BYTES, NAMESPACE_FIELD
from kvstrata.parts import PORTABLE, at_level
from kvstrata.tiers.base import Outcome, SharedTier, Stat
from kvstrata.tiers.marks import Mark

logger = logging.getLogger(__name__)

MAX_ORDERS = 4
"""Byte orders that one question is asked in; an engine reads its own, and the portable one."""
LONGEST_S = 0.15
"""A store that is far away is waited for longer than its timeout says: one and a half of its round
trips, but never more than this."""
TOUCH_SLICE = 256
USES_SLICE = 16
"""Chunks that were used whose names are made without a pause."""


class SharedBacking(Singly):
    """A shared tier in the node's service.

    Args:
        tier: the store.
        lookup_timeout_s: how long a match waits for its answer.
        others: as of `Backing`.
    """

    tier: SharedTier
    must_be_asked = True

    def __init__(self, tier: SharedTier, *, lookup_timeout_s: float, **others: Any) -> None:
        super().__init__(tier, **others)
        self.capacity_bytes = tier.capacity_bytes
        self.lookup_timeout_s = lookup_timeout_s
        self._hints = Hints(others["clock"])
        self._presence = Presence(
            tier, self._calls, self._health, others["clock"], self._renewed, self._heard_marks
        )
        self._asking = Asking(
            tier, self._stat, 1 + len(self.coarser),
            calls=self._calls, hints=self._hints, counters=self._counters,
        )  # fmt: skip
        self._weeding = Weeding(
            tier, self._checked, self.marks,
            calls=self._calls, turns=self._turns, scratch=self._scratch, trip=self.trip,
        )  # fmt: skip
        self._seen_so_far = Seen()
        self._uses = Uses()
        self._upkeeping = asyncio.Lock()
        self.allowed: Callable[[], bool] = alone
        """Whether the node may use what its fleet shares."""
        self._link_test = LinkTest(self._calls, tier, self._scratch, self._fetch)

    # what it holds

    @property
    def epoch(self) -> int | None:
        """Number of the present epoch; None while the store is not in use."""
        return self._epoch_there if self.allowed() else None

    @property
    def _epoch_there(self) -> int | None:
        """The same, whether the node may use the store or not."""
        return None if self._health.off_s else self._presence.number

    @property
    def readable(self) -> bool:
        return super().readable and self.epoch is not None

    @property
    def state(self) -> str:
        waiting = not self._health.off_s and self.epoch is None
        if waiting and not self.allowed():
            return "waiting for the fleet's registry"
        return "waiting for the store to answer" if waiting else super().state

    def find(self, key: bytes, part: int, orders: Iterable[str] | None) -> int | None:
        """See `Backing.find`: as `resolve` heard lately."""
        hint = self._hints.fresh(key, part, orders)
        return hint.nbytes if hint is not None and hint.where.epoch == self.epoch else None

    def has(self, key: bytes, part: int, orders: Iterable[str]) -> bool:
        """Nothing is there for sure: what an engine has computed is worth having nearer."""
        return False

    async def resolve(self, question: Question) -> bool:
        """See `Backing.resolve`. What comes too late for this match is there for the next."""
        epoch = self.epoch
        question = question._replace(orders=question.orders[:MAX_ORDERS])
        if epoch is None or not question.keys or not question.orders:
            return True
        self._seen_so_far.note(question.namespace, question.orders, question.parts)
        asking = self._tasks.spawn("a question", self._hear(question, epoch))
        await asyncio.wait({asking}, timeout=self.patience_s)
        if not asking.done():
            self._counters.add("late_lookups_total", tier=self.name)
        return asking.done()

    async def ask(self, question: Question) -> None:
        """Hear all that the store says to a question, however long that takes."""
        question = question._replace(orders=question.orders[:MAX_ORDERS])
        if (epoch := self.epoch) is not None and question.keys and question.orders:
            self._seen_so_far.note(question.namespace, question.orders, question.parts)
            await self._hear(question, epoch)

    def _stat(self, question: Question, names: Sequence[bytes]) -> list[Stat | Outcome]:
        """What the store says for a question; blocks."""
        return self.tier.stat(names)

    @property
    def patience_s(self) -> float:
        """For how long a match waits for the store's word."""
        return max(self.lookup_timeout_s, min(LONGEST_S, 1.5 * self._presence.round_s))

    async def _hear(self, question: Question, epoch: int) -> None:
        try:
            await self._asking.ask(question, epoch, lambda: self.epoch == epoch)
        except TierUnavailable as error:
            self.trip(error)

    async def spared(self, keys: Sequence[bytes], origin: Origin) -> set[bytes]:
        """See `Backing.spared`: one batch of questions for the whole commit."""
        epoch = self.epoch
        if epoch is None or len(origin.namespace) != 32:
            return set()
        try:
            return await self._asking.there(keys, origin, epoch)
        except TierUnavailable as error:
            self.trip(error)
            return set()

    def cost_of(self, key: bytes) -> float:
        return 0.0

    def use(self, keys: list[bytes]) -> None:
        self._uses.note(keys)

    def written(self, prefix: list[bytes]) -> None:
        return

    def holdings(self) -> dict[str, Any]:
        epoch = self.epoch
        return {
            "shared": True,
            "epoch": None if epoch is None else f"{epoch:016x}",
            "num_hints": len(self._hints),
        }

    # service

    async def run(self) -> None:
        """Keep up with the store's epoch; and see once how fast it is."""
        self._tasks.spawn(f"the epoch of {self.name}", self._presence.run())
        while not self._timed:
            await asyncio.sleep(0.05)
            if (epoch := self.epoch) is not None and self.writable:
                try:
                    await self._link_test.run(epoch)
                    self._health.wrote()
                    self._timed = True
                except TierUnavailable as error:
                    self.trip(error)

    async def upkeep(self) -> None:
        """Tell the store what was used, and let it do what is due."""
        async with self._upkeeping:  # a node that ends does it once more, whoever is at it
            await self._keep_up()

    async def _keep_up(self) -> None:
        await super().upkeep()
        used = await self._uses.take()
        if self._health.read_only:
            return  # notes of uses are written, too
        try:
            while used and self.readable:
                names: list[bytes] = []
                while used and len(names) < TOUCH_SLICE:
                    names += self._names_of(
                        used.popleft() for _ in range(min(len(used), USES_SLICE))
                    )
                    await asyncio.sleep(0)
                if names:
                    await self._calls.call("note of use", partial(self.tier.touch, names))
            if self.readable:
                await self._calls.call("upkeep", self.tier.upkeep)
        except TierUnavailable as error:
            self.trip(error)

    def _names_of(self, keys: Iterable[bytes]) -> list[bytes]:
        """Of the objects of these chunks that were seen in the present epoch."""
        return [
            hint.where.name(key, part)
            for key in keys
            for part, hint in self._hints.of(key)
            if hint.where.epoch == self.epoch
        ]

    def _when_off(self) -> None:
        self._presence.lose()

    # forgetting

    def clear(self) -> Awaitable[int]:
        """See `Backing.clear`; the answer once no node of the fleet uses the old epoch any more."""
        self._hints.clear()
        for writing in self._writes:
            writing.wanted = False
        return self._cleared(asyncio.ensure_future(self._presence.end()))

    async def _cleared(self, ending: asyncio.Future[Any]) -> int:
        try:
            before = await ending
        except ReadOnly as error:
            raise ReadOnly(
                f"{self.name} is not cleared, since this node may only read it; clear it at a node "
                f"that may write: {error}"
            ) from error
        except TierUnavailable as error:
            raise TierUnavailable(
                f"{self.name}: this node serves nothing of it any more, but others may until the "
                f"store can be told: {error}"
            ) from error
        await asyncio.sleep(self._presence.lasts_s)
        if before is not None:
            self._tasks.spawn(f"the end of an epoch of {self.name}", self._forget(before.number))
        return 0

    def mark(self, mark: Mark, *, aged: bool) -> Awaitable[int]:
        """See `Backing.mark`; the answer once every node of the fleet has heard of it."""
        self.marks.add(mark)
        return self._marked(asyncio.ensure_future(self._presence.mark(mark)))

    async def _marked(self, telling: asyncio.Future[None]) -> int:
        try:
            await telling
        except TierUnavailable as error:
            kind = ReadOnly if isinstance(error, ReadOnly) else TierUnavailable
            raise kind(
                f"{self.name}: this node serves nothing of it any more, but others may until the "
                f"store can be told: {error}"
            ) from error
        await asyncio.sleep(self._presence.lasts_s)
        return 0

    def _renewed(self) -> None:
        """A new epoch has begun, and there is nothing yet that could have been cleared in it."""
        self._hints.clear()
        self.marks.clear()

    def _heard_marks(self, marks: Sequence[Mark]) -> None:
        for mark in marks:
            self.marks.add(mark)

    async def _forget(self, epoch: int) -> None:
        try:
            count = await self._calls.call("removal", partial(self.tier.forget, epoch))
            logger.info("%s: %d objects of an epoch that has passed are gone", self.name, count)
        except TierUnavailable as error:
            self.trip(error)

    def drop(self, keys: Iterable[bytes]) -> Awaitable[int]:
        gone = set(keys)
        for key in gone:
            self._hints.forget_chunk(key)
        for writing in self._writes:
            writing.wanted = writing.wanted and writing.key not in gone
        return self._dropped(gone, self._epoch_there)

    async def _dropped(self, keys: set[bytes], epoch: int | None) -> int:
        if epoch is None:
            raise TierUnavailable(f"{self.name}: cannot be told what to forget: {self.state}")
        names = list(self._seen_so_far.names(epoch, keys, 1 + len(self.coarser)))

        def work() -> int:
            size, count = self.tier.limits.batch_objects, 0
            for start in range(0, len(names), size):
                answers = self.tier.delete(names[start : start + size])
                if Outcome.FAILED in answers:
                    raise TierUnavailable("not all of it could be deleted")
                count += answers.count(HIT)
            return count

        try:
            return await self._calls.call("removal", work)
        except TierUnavailable as error:
            raise TierUnavailable(f"{self.name}: {error}; others may still find it") from error

    async def remove(self, key: bytes, part: int, seen: Any, cause: Cause) -> bool:
        """See `Singly.remove`; one that others put there meanwhile is not told from this one."""
        if not isinstance(seen, Where) or seen.epoch != self.epoch:
            return False
        order = seen._replace(order=PORTABLE)
        names = [seen.name(key, part)]
        names += [order.name(key, at_level(part, 1 + i)) for i in range(len(self.coarser))]
        with self._turns.take([(key, part)]) as turn:
            await turn.come()
            if self._seen(key, part) == seen:
                self._hints.forget(key, part)
            answers = await self._calls.call("removal", partial(self.tier.delete, names), turn.hang)
        return answers[0] is not Outcome.FAILED

    # writing

    async def _store(
        self,
        writing: Writing,
        turn: Turn,
        data: memoryview,
        order: str,
        origin: Origin,
        hang: Callable[[], None],
    ) -> bool:
        """See `Carrier._store`; what is there already stays."""
        (name,), nbytes, epoch = turn.names, len(data), self.epoch
        if epoch is None or nbytes > self.tier.limits.batch_bytes:
            return False
        where = Where(epoch, bytes(data[NAMESPACE_FIELD]), order)
        self._seen_so_far.note(where.namespace, [order], [name[1]])
        try:
            stored = Stored(where.name(*name), data, epoch, if_absent=not writing.replaces)
            outcome = await self._puts.put(stored, hang)
        except TierUnavailable as error:
            self.trip(error)
            return False
        self._counters.add("tier_writes_total", tier=self.name, outcome=outcome.value)
        if outcome is Outcome.FAILED:
            return False
        self._health.wrote()
        if not writing.wanted or (outcome is HIT and self.marks.covers_page(data)):
            # A clear of some chunks; after one of all of them nobody asks for this epoch.
            await self._weeding.take_away(turn, where.name(*name), "")
            return False
        if outcome is HIT:
            self._counters.add("tier_write_bytes_total", nbytes, tier=self.name)
        if self.epoch == epoch:
            self._hints.note(*name, where, nbytes)
        return True

    # reading

    async def read(
        self,
        key: bytes,
        part: int,
        nbytes: int,
        into: memoryview,
        give_up: Callable[[], None] = nothing,
    ) -> ObjectHeader | None:
        """See `Backing.read`; ``nbytes`` may be a guess, and the slot is as long as need be.

        All but what is encrypted, which may be longer by a page.
        """
        epoch = self.epoch
        longer = self._keys is not None or nbytes > len(into)
        bound = len(into) + HEADER_BYTES * longer
        header = await super().read(key, part, bound, into, give_up)
        return header if epoch is not None and self.epoch == epoch else None

    def _name(self, key: bytes, part: int) -> bytes | None:
        hint = self._hints.last(key, part)
        if hint is None or hint.where.epoch != self.epoch:
            return None
        return hint.where.name(key, part)

    def _seen(self, key: bytes, part: int) -> Where | None:
        hint = self._hints.last(key, part)
        return None if hint is None else hint.where

    def _reject(self, key: bytes, part: int, seen: object) -> None:
        if isinstance(seen, Where) and self._health.read_only:
            return self._hints.refuse(key, part, seen)  # it stays where it is
        self._hints.forget(key, part)
        if isinstance(seen, Where):
            self._tasks.spawn("a removal", self._weeding.take_out(key, part, seen.name(key, part)))

    def _strike(self, key: bytes, part: int, seen: object) -> None:
        self._reject(key, part, seen)

    def _leave(self, key: bytes, part: int, seen: object) -> None:
        if isinstance(seen, Where):
            self._hints.refuse(key, part, seen)

    def _missed(self, key: bytes, part: int, seen: object, outcome: Outcome) -> None:
        self._hints.forget(key, part)

    def _learn(self, key: bytes, part: int, header: ObjectHeader) -> None:
        if (hint := self._hints.last(key, part)) is not None:
            self._hints.note(key, part, hint.where, hint.nbytes)

    # laws

    def check_integrity(self) -> None:
        """Raise AssertionError unless the hints keep to their bound."""
        self._hints.check_integrity()
