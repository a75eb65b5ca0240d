"""Chunks from one tier of the node to another, verified on the way.

Each chunk is read out of its tier, checked, and stored as the other tier stores. A move removes a
chunk only once all of it stands in the other tier, so a node that dies on the way has it in one of
them, or in both. Nor does a chunk leave before those that were asked for before it have come, or
could not: of a prompt that is moved head first the other tier has the beginning and this one the
end at any moment, and there is no hole, where a match would end. What is cleared while it is on its
way is not stored.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from kvstrata.errors import CorruptObject, KVStrataError, TierUnavailable, UsageError
from kvstrata.header import ObjectHeader
from kvstrata.node.common.background import Threads
from kvstrata.node.common.changes import Cause
from kvstrata.node.operating.jobs import Job, Stopped
from kvstrata.node.operating.places import Made, Places
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.single import Singly, unreachable
from kvstrata.node.slots.slot import Slot
from kvstrata.objects import verify_object
from kvstrata.parts import PERHAPS_LOSSY, PORTABLE, identity, order_name
from kvstrata.tiers.marks import Whose
from kvstrata.wire.protocol import split

R = TypeVar("R")

SLICE = 2048
AT_ONCE = 4
"""Objects of all jobs together that are on their way at once: so many buffers of a tier's."""
ASK_CHUNKS = 256
"""Chunks that a shared tier is asked for at once, before the first of them is copied."""


class OnWay:
    """A chunk on its way; not wanted once it is cleared."""

    __slots__ = ("key", "wanted")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.wanted = True


class Lent(NamedTuple):
    """An object that lies still meanwhile: whole, raw and verified; and its header as stored."""

    data: memoryview
    header: ObjectHeader
    stored: ObjectHeader
    cost: float
    priority: int


class Copier:
    """Moves objects between the tiers of the node, for jobs.

    Args:
        places: the tiers.
        threads: for what has to be computed or copied on the way.
    """

    def __init__(self, places: Places, threads: Threads) -> None:
        self._places = places
        self._threads = threads
        self._on_way: set[OnWay] = set()
        self._leaving: set[tuple[bytes, str]] = set()  # chunks, each with its tier
        self._filling: list[Slot] = []
        self._gate = asyncio.Semaphore(AT_ONCE)

    def check(self, source: str, target: str, made: Made, *, moves: bool) -> None:
        """Raise `UsageError` where nothing can go from one to the other."""
        one, other = self._places.named(source), self._places.named(target)
        if source == target:
            raise UsageError(f"from {source} to {target} there is no way to go")
        for backing in (one, other):
            if backing is not None:
                made.check_for(backing)
        if other is not None and not other.takes_writes:
            raise UsageError(f"nothing is ever written to {target}")
        if moves and one is not None and not one.takes_writes:
            raise UsageError(f"what is in {source} is not this node's to remove: copy it")

    async def run(
        self, job: Job, keys: list[bytes], source: str, target: str, made: Made, *, moves: bool
    ) -> None:
        """Bring these chunks from one tier to another; those that are there already stay.

        Raises:
            TierUnavailable: one of the tiers cannot be used any more.
        """
        job.total = len(keys)
        absent = there = 0
        mine = [one for one in (self._places.named(source), self._places.named(target)) if one]
        for start in range(0, len(keys), ASK_CHUNKS):
            some = keys[start : start + ASK_CHUNKS]
            await self._places.ask(some, made, mine)
            for place in range(0, len(some), AT_ONCE):
                job.check()
                for one in mine:
                    if not one.readable:
                        raise unreachable(one)
                for answer in await self._bring_some(
                    job, some[place : place + AT_ONCE], source, target, made, moves
                ):
                    job.done += 1
                    absent += answer == "absent"
                    there += answer == "there"
                job.note = "".join([
                    f"{there} were there already; " if there else "",
                    f"{absent} were not in {source}; " if absent else "",
                ]).removesuffix("; ")  # fmt: skip

    def forget(self, keys: set[bytes] | None) -> None:
        """Store nothing that is on its way of these chunks (None: of all)."""
        for one in self._on_way:
            one.wanted = one.wanted and not (keys is None or one.key in keys)

    def filling(self) -> list[Slot]:
        """The slots of host memory that are being filled."""
        return list(self._filling)

    @contextlib.contextmanager
    def on_way(self, key: bytes) -> Iterator[OnWay]:
        """Hear of it when the chunk is cleared meanwhile."""
        one = OnWay(key)
        self._on_way.add(one)
        try:
            yield one
        finally:
            self._on_way.discard(one)

    @contextlib.asynccontextmanager
    async def lent(self, key: bytes, part: int, source: str) -> AsyncIterator[Lent | None]:
        """An object out of a tier, whole and verified; None: it cannot be had."""
        backing = self._places.named(source)
        async with self._gate:
            with contextlib.ExitStack() as moving:
                for one in self._places.backings:
                    moving.enter_context(one.moving())
                async with self._taken(key, part, backing) as taken:
                    yield taken

    @contextlib.asynccontextmanager
    async def _taken(
        self, key: bytes, part: int, backing: Singly | None
    ) -> AsyncIterator[Lent | None]:
        if backing is None:
            async with self._held(key, part) as held:
                yield held
            return
        taken = await backing.take(key, part, self._places.host.pool.capacity_bytes)
        if taken is None:
            yield None
            return
        try:
            cost, priority = backing.cost_of(key), backing.priority_of(key)
            yield Lent(taken.data, taken.header, taken.stored, cost, priority)
        except asyncio.CancelledError:
            raise  # a thread may be at it still
        except BaseException:
            backing.give(taken)
            raise
        else:
            backing.give(taken)

    @contextlib.asynccontextmanager
    async def _held(self, key: bytes, part: int) -> AsyncIterator[Lent | None]:
        host = self._places.host
        slot = host.get(key, part)
        if slot is None:
            yield None
            return
        host.hold(slot)
        try:
            view = host.pool.view(slot.offset, slot.nbytes)
            try:
                header = await self.do(lambda: verify_object(view, identity(key, part)))
            except CorruptObject:
                if host.get(key, part) is slot:
                    host.drop_object(key, part, Cause.CORRUPT)
                raise
            cost, priority = host.index.cost_of(key), host.index.priority_of(key)
            yield Lent(view, header, header, cost, priority)
        finally:
            host.unhold(slot)

    async def _bring_some(
        self, job: Job, keys: list[bytes], source: str, target: str, made: Made, moves: bool
    ) -> list[str]:
        """Bring a few chunks at once; of a move they leave when all of them have come.

        Returns:
            For each chunk ``absent``, ``there`` already, ``failed`` or ``done``.
        """
        with contextlib.ExitStack() as ways:
            chunks = [
                (ways.enter_context(self.on_way(key)), self._parts_seen(key, source, made))
                for key in keys
            ]
            answers = await _all_of([
                self._bring(job, way, seen, source, target, made) for way, seen in chunks
            ])  # fmt: skip
            if moves:
                await _all_of([
                    self._remove(job, way, seen, source, target, made)
                    for (way, seen), answer in zip(chunks, answers, strict=True)
                    if answer in ("there", "done")
                ])  # fmt: skip
        return answers

    def _parts_seen(self, key: bytes, source: str, made: Made) -> dict[int, object]:
        """What a tier has of each part of a chunk; those it can do without only if they are."""
        parts = made.parts or tuple(self._places.parts_of(key, source))
        seen = {part: self._seen(key, part, source, made) for part in parts}
        for part in made.optional:
            if seen[part] is None:
                del seen[part]
        return seen

    async def _bring(
        self,
        job: Job,
        way: OnWay,
        seen: dict[int, object],
        source: str,
        target: str,
        made: Made,
    ) -> str:
        """Bring one chunk; ``absent``, ``there`` already, ``failed`` or ``done``."""
        answers: list[str] = []
        for part, before in seen.items():
            if self._is_there(way.key, part, target, made):
                answers.append("there")
            elif before is None:
                answers.append("absent")
            else:
                answers.append(await self._bring_one(job, way, part, source, target))
        if not answers or "absent" in answers:
            return "absent"
        if "failed" in answers:
            return "failed"
        return "there" if set(answers) == {"there"} else "done"

    async def _bring_one(self, job: Job, way: OnWay, part: int, source: str, target: str) -> str:
        name = identity(way.key, part).hex()
        try:
            async with self.lent(way.key, part, source) as lent:
                if lent is None:
                    job.trouble(f"object {name} could not be read from {source}")
                    return "failed"
                problem = await self._store(way, part, lent, target)
                nbytes = len(lent.data)
        except (asyncio.CancelledError, Stopped, TierUnavailable):
            raise
        except KVStrataError as error:
            problem = str(error)
        if problem:
            job.trouble(f"object {name}: {problem}")
            return "failed"
        job.nbytes += nbytes
        return "done"

    async def _store(self, way: OnWay, part: int, lent: Lent, target: str) -> str:
        """Store what was taken; why it could not be, in words."""
        backing, key = self._places.named(target), way.key
        order = order_name(lent.header.kind, lent.header.order)
        if backing is None:
            return await self._fill(way, part, lent, order)
        if not way.wanted:
            return "it was cleared meanwhile"
        namespace, priority = lent.header.namespace, lent.priority
        origin = Origin([key], part, order, lent.cost, "", namespace, priority=priority)
        if order not in PERHAPS_LOSSY:
            stored = await backing.write(key, lent.data, origin)
        else:
            if problem := twice_lossy(lent.stored, backing):
                return problem
            # A coarser copy would be the second loss, perhaps.
            stored = await backing.put(key, lent.data, origin, backing.choice, replaces=False)
        if stored:
            return ""
        return f"{target} has not taken it: {backing.state}"

    async def _fill(self, way: OnWay, part: int, lent: Lent, order: str) -> str:
        host, key = self._places.host, way.key
        whose = Whose(lent.header.owner, lent.header.namespace)
        slot = host.allocate(len(lent.data), whose.owner)
        if slot is None:
            return "there is no room in host memory"
        self._filling.append(slot)
        view = host.pool.view(slot.offset, slot.nbytes)

        def fill() -> None:
            view[:] = lent.data

        try:
            await self.do(fill)
        except asyncio.CancelledError:
            raise  # the slot stays withheld, a thread may be at it still
        self._filling.remove(slot)
        cleared = not way.wanted or any(
            one.marks.covers(whose, lent.header.created_ns) for one in self._places.backings
        )
        may = host.get(key, part) is None and host.quotas.may_publish(key, slot, whose)
        if not cleared and may:
            host.publish(key, part, slot, order, lent.cost, whose, lent.priority)
        else:
            host.discard(slot)
        host.unhold(slot)
        return "it was cleared meanwhile" if cleared else ""

    async def _remove(
        self, job: Job, way: OnWay, seen: dict[int, object], source: str, target: str, made: Made
    ) -> None:
        """End a move: all of the chunk stands in the other tier, or it stays where it is."""
        stays = all(self._is_there(way.key, part, target, made) for part in seen)
        # Another move may take it out of there for its being here.
        if not stays or (way.key, target) in self._leaving:
            if not way.wanted:
                return  # it was cleared
            job.trouble(f"chunk {way.key.hex()} did not stay in {target}, so it stays in {source}")
            return
        if self._places.keeps(way.key, source) and not self._places.can_keep(target):
            job.trouble(f"chunk {way.key.hex()} is pinned, so it stays in {source} too")
            return
        self._leaving.add((way.key, source))
        try:
            await self._remove_parts(job, way.key, seen, source)
        finally:
            self._leaving.discard((way.key, source))

    async def _remove_parts(
        self, job: Job, key: bytes, seen: dict[int, object], source: str
    ) -> None:
        backing = self._places.named(source)
        for part, before in seen.items():
            if backing is not None and before is not None:
                if not await backing.remove(key, part, before, Cause.MOVED):
                    job.trouble(f"object {identity(key, part).hex()} is still in {source}")
            elif backing is None and self._places.host.get(key, part) is before:
                self._places.host.drop_object(key, part, Cause.MOVED)

    def _seen(self, key: bytes, part: int, tier: str, made: Made) -> object:
        """What tells the object that a tier has now from all others; None: it has none."""
        backing = self._places.named(tier)
        if backing is None:
            return self._places.host.get(key, part)
        orders = (*made.orders, PORTABLE) if made.orders else None
        there = backing.find(key, part, orders) is not None
        return backing.seen(key, part) if there else None

    def _is_there(self, key: bytes, part: int, tier: str, made: Made) -> bool:
        return self._seen(key, part, tier, made) is not None

    async def do(self, work: Callable[[], R]) -> R:
        """Compute something in a thread."""
        return await asyncio.wrap_future(self._threads.submit(work))


def twice_lossy(stored: ObjectHeader, backing: Singly) -> str:
    """Why an object, portable or kept, may not go where a lossy codec stores; empty: it may.

    Lossy codecs leave these orders, and nothing else tells KV that has been through one.
    """
    choice = backing.choice
    if choice is None or choice.lossless or stored.kind not in PERHAPS_LOSSY:
        return ""
    return (
        f"{backing.name} stores with {choice.name}, and this may have been through a lossy codec "
        "already: nothing is encoded so a second time"
    )


async def _all_of(works: Iterable[Awaitable[R]]) -> list[R]:
    """Their answers, once all have ended; raises what the first of them raised that did."""
    answers: list[R] = []
    for answer in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(answer, BaseException):
            raise answer
        answers.append(answer)
    return answers


async def taken_in(packed: bytes) -> list[bytes]:
    """The keys of a request, each once, without holding the loop."""
    keys: dict[bytes, None] = {}
    for start in range(0, len(packed), 32 * SLICE):
        if start:
            await asyncio.sleep(0)
        keys.update(dict.fromkeys(split(packed[start : start + 32 * SLICE], 32)))
    return list(keys)
