"""Objects on their way into a slower tier and out of it: verified, encoded, encrypted, counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvstrata.brought import checksum_of
from kvstrata.errors import CorruptObject, Incompatible, TierUnavailable, UsageError
from kvstrata.header import ObjectHeader
from kvstrata.node.coding.choosing import Choice
from kvstrata.node.coding.recoding import (
    Encoded,
    checked_object,
    encoded_object,
    restored_object,
    sealed_object,
)
from kvstrata.node.common.background import report_bug
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.calls import nothing
from kvstrata.node.service.moves import Read, Writing
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.puts import Puts
from kvstrata.node.service.turns import Turn
from kvstrata.parts import at_level, identity, order_name
from kvstrata.tiers.base import Outcome, Store
from kvstrata.tiers.marks import Marks, Whose

if TYPE_CHECKING:
    from kvstrata.node.coding.sealing import KeyRing

logger = logging.getLogger(__name__)

HIT = Outcome.HIT

UNKNOWN_S = 1.0
"""What computing a chunk is taken to cost, for the choice of a codec, where nobody has said."""


class Carrier(Backing):
    """What moves a tier's objects; the arguments are those of `Backing`."""

    writes_together = False
    """Whether several small objects are better written by one thread than by several."""

    def __init__(self, store: Store, **others: Any) -> None:
        super().__init__(store, **others)
        self.marks = Marks()
        """What counts as cleared here, whoever finds it."""
        self.under_way: set[object] = set()
        """Reads, writes and copies, which may bring what was there before a mark."""
        self._writes: set[Writing] = set()
        most = self.num_threads if self.writes_together else 1
        self._puts = Puts(self.tier, self._calls, self._pages, self._tasks, most)

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Something of this tier, or for it, is under way: no mark is forgotten meanwhile."""
        one = object()
        self.under_way.add(one)
        try:
            yield
        finally:
            self.under_way.discard(one)

    # what a subclass knows of an object

    def _name(self, key: bytes, part: int) -> bytes | None:
        """What the store knows an object by; None: nothing, so it is absent."""
        return identity(key, part)

    @abstractmethod
    def _seen(self, key: bytes, part: int) -> object:
        """What tells the object that is there now from all others of its name."""

    @abstractmethod
    def _reject(self, key: bytes, part: int, seen: object) -> None:
        """Take an object out of service that was read and found corrupt, if it is still there."""

    @abstractmethod
    def _strike(self, key: bytes, part: int, seen: object) -> None:
        """Take an object away that was read and had been cleared, if it is still there."""

    @abstractmethod
    def _leave(self, key: bytes, part: int, seen: object) -> None:
        """An object was read that this release does not know: absent, but for its bytes."""

    @abstractmethod
    def _missed(self, key: bytes, part: int, seen: object, outcome: Outcome) -> None:
        """An object could not be read: it was not there, or the tier failed with it."""

    @abstractmethod
    def _learn(self, key: bytes, part: int, header: ObjectHeader) -> None:
        """An object was read; this is its header, as it is raw."""

    async def _may_write(self) -> bool:
        """Wait until the tier takes writes at all; False: it will not."""
        return True

    @abstractmethod
    async def _store(
        self,
        writing: Writing,
        turn: Turn,
        data: memoryview,
        order: str,
        origin: Origin,
        hang: Callable[[], None],
    ) -> bool:
        """Put the object whose turn it is into the tier."""

    # reading

    async def read(
        self,
        key: bytes,
        part: int,
        nbytes: int,
        into: memoryview,
        give_up: Callable[[], None] = nothing,
    ) -> ObjectHeader | None:
        """See `Backing.read`."""
        name, stored_as = identity(key, part), self._name(key, part)

        def work() -> Read:
            if stored_as is None:
                return Read(Outcome.MISS)
            if nbytes == len(into) and self._keys is None:
                length = self._fetch(stored_as, into)
                if length == len(into):
                    return self._restored(into, name, into, checksum_of(length))
                if isinstance(length, Outcome):
                    return Read(length)
                with self._scratch.buffer(length) as stored:
                    stored[:] = into[:length]
                    return self._restored(stored, name, into, checksum_of(length))
            with self._scratch.buffer(nbytes) as stored:
                length = self._fetch(stored_as, stored)
                if isinstance(length, Outcome):
                    return Read(length)
                return self._restored(stored[:length], name, into, checksum_of(length))

        with self.moving():
            return await self._judge(key, part, lambda: self._calls.read(work, give_up))

    async def time(self, key: bytes, part: int, nbytes: int) -> None:
        """See `Backing.time`."""
        stored_as = self._name(key, part)

        def work() -> None:
            if stored_as is not None:
                with self._scratch.buffer(nbytes) as stored:
                    self._fetch(stored_as, stored)

        try:
            await self._calls.read(work)
        except TierUnavailable as error:
            self.trip(error)

    def _restored(
        self, data: memoryview, name: bytes, into: memoryview, made: bytes | None
    ) -> Read:
        begun = time.perf_counter()
        header = restored_object(data, name, into, self._keys, self._scratch, made)
        return Read(HIT, header, len(data), time.perf_counter() - begun)

    def _checked(self, data: memoryview, name: bytes) -> ObjectHeader:
        return checked_object(data, name, self._keys, self._scratch)

    async def _judge(
        self, key: bytes, part: int, read: Callable[[], Awaitable[Read]]
    ) -> ObjectHeader | None:
        """Read, count, and see to it that what is no good is not read again."""
        name, seen = identity(key, part), self._seen(key, part)
        try:
            outcome, header, nbytes, restoring_s = await read()
        except CorruptObject as error:
            logger.error("%s: object %s is rejected: %s", self.name, name.hex(), error)
            self._counters.add("corrupt_objects_total", tier=self.name)
            self._reject(key, part, seen)
            return None
        except Incompatible as error:
            # Of a later release or another key, perhaps: somebody wants to find it again.
            logger.warning("%s: object %s is left alone: %s", self.name, name.hex(), error)
            self._counters.add("incompatible_objects_total", tier=self.name)
            self._leave(key, part, seen)
            return None
        except UsageError as error:
            logger.warning("%s: object %s is not for this reader: %s", self.name, name.hex(), error)
            return None
        except TierUnavailable as error:
            self.trip(error)
            return None
        self._counters.add("tier_reads_total", tier=self.name, outcome=outcome.value)
        if header is None:
            self._missed(key, part, seen, outcome)
        else:
            self._health.worked()
            self._counters.add("tier_read_bytes_total", nbytes, tier=self.name)
            if restoring_s:
                raw = header.raw_length
                self._counters.add("restored_bytes_total", raw, tier=self.name)
                self._counters.add("restored_seconds_total", restoring_s, tier=self.name)
            if self.marks.covers(Whose(header.owner, header.namespace), header.created_ns):
                self._counters.add("cleared_objects_total", tier=self.name)
                self._strike(key, part, seen)
                return None
            self._learn(key, part, header)
        return header

    def _fetch(self, name: bytes, into: memoryview) -> int | Outcome:
        """Read one object as it is stored, and measure how fast that goes."""
        brought, begun = 0, self._clock()
        self.bandwidth.begin()
        try:
            length = self._ask(name, into)
            brought = 0 if isinstance(length, Outcome) else length
        finally:
            self.bandwidth.end(brought)
        if brought:
            self.bandwidth.took(self._clock() - begun)
        return length

    def _ask(self, name: bytes, into: memoryview) -> int | Outcome:
        (length,) = self.tier.read([name], [into])
        return length

    # writing

    async def write(
        self, key: bytes, data: memoryview, origin: Origin, give_up: Callable[[], None] = nothing
    ) -> bool:
        """See `Backing.write`."""
        writing = Writing(key)
        self._writes.add(writing)
        try:
            with self.moving():
                if not await self._may_write():
                    return False
                stored = await self._write(writing, data, origin, self.choice, 0, give_up)
                for level, choice in enumerate(self.coarser, 1):
                    if stored:
                        await self._write(writing, data, origin, choice, level, give_up)
        finally:
            self._writes.discard(writing)
        return stored

    async def _write(
        self,
        writing: Writing,
        data: memoryview,
        origin: Origin,
        choice: Choice | None,
        level: int,
        give_up: Callable[[], None],
    ) -> bool:
        name = writing.name = writing.key, at_level(origin.part, level)
        with self._turns.take([name]) as turn:

            def hang() -> None:
                turn.hang()
                give_up()

            try:
                await turn.come()
                if not (writing.wanted and self.writable) or self.marks.covers_page(data):
                    return False
                encoded = await self._encoded(choice, data, origin, level, hang)
            except TierUnavailable:  # which has been said already
                return False
            if encoded is None and level:
                return False  # a copy that is no smaller is none: the object itself has to do
            with self._lent(encoded):
                order = origin.order
                if encoded is not None:
                    data, order = (
                        encoded.data,
                        order_name(encoded.header.kind, encoded.header.order),
                    )
                if self._keys is None:
                    return await self._store(writing, turn, data, order, origin, hang)
                sealed = await self._sealed(self._keys, data, hang)
                if sealed is None:
                    return False
                with self._lent(sealed):
                    return await self._store(writing, turn, sealed.data, order, origin, hang)

    @contextlib.contextmanager
    def _lent(self, encoded: Encoded | None) -> Iterator[None]:
        """Give the object's buffer back in the end, unless a thread may still read it."""
        try:
            yield
        except asyncio.CancelledError:
            encoded = None
            raise
        finally:
            if encoded is not None:
                self._scratch.give(encoded.buffer)

    async def _encoded(
        self,
        choice: Choice | None,
        data: memoryview,
        origin: Origin,
        level: int,
        give_up: Callable[[], None],
    ) -> Encoded | None:
        """The object as this tier stores it; None where it stays as it is.

        Raises:
            CorruptObject: ``data`` is not what its writer made a checksum of.
            TierUnavailable: encoding hangs.
        """
        if choice is None or choice.always_raw:
            return None
        place = self.place()

        def work() -> Encoded | None:
            codec = choice.of(origin.weights, (origin.cost or UNKNOWN_S) / len(data), place)
            if codec is None:
                return None
            return encoded_object(codec, data, self._scratch, level)

        try:
            encoded = await self._calls.encode(work, give_up)
        except (CorruptObject, TierUnavailable):
            raise
        except Exception as error:
            report_bug(self._counters, f"codec {choice.name}", error)
            return None
        if encoded is not None:
            stored = len(encoded.data)
            self._counters.add("encoded_bytes_total", len(data), tier=self.name, of="raw")
            self._counters.add("encoded_bytes_total", stored, tier=self.name, of="stored")
        return encoded

    async def _sealed(
        self, keys: KeyRing, data: memoryview, give_up: Callable[[], None]
    ) -> Encoded | None:
        """The object encrypted; None if that could not be, and it must not be stored.

        Raises:
            CorruptObject: its header is damaged.
        """
        try:
            return await self._calls.encode(
                lambda: sealed_object(keys, data, self._scratch), give_up
            )
        except CorruptObject:
            raise
        except TierUnavailable:  # which has been said already
            return None
        except UsageError as error:
            logger.warning("%s: an object is not stored: %s", self.name, error)
            return None
        except Exception as error:
            report_bug(self._counters, "encryption", error)
            return None
