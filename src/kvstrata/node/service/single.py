"""One object of a slower tier at a time, as an operator handles them: taken, stored again, removed.

Serving engines goes by slots and leases; this goes by buffers of the tier's own, and knows of an
object no more than its header says.
"""

from __future__ import annotations

import mmap
from abc import abstractmethod
from typing import Any, NamedTuple

from kvstrata.brought import checksum_of
from kvstrata.errors import CorruptObject, Incompatible, TierUnavailable, UsageError
from kvstrata.header import ObjectHeader
from kvstrata.node.coding.choosing import Choice
from kvstrata.node.common.changes import Cause
from kvstrata.node.service.carrier import Carrier
from kvstrata.node.service.moves import Read, Writing
from kvstrata.node.service.origin import Origin
from kvstrata.objects import HEADER_BYTES, stored_bytes, verify_object
from kvstrata.objects import decode as decode_header
from kvstrata.parts import identity
from kvstrata.tiers.base import Outcome, Stat


class Taken(NamedTuple):
    """An object out of a tier, verified.

    Args:
        data: the whole object as it is raw.
        header: of that.
        stored: its header as the tier keeps it.
        buffer: for `Singly.give` afterwards.
    """

    data: memoryview
    header: ObjectHeader
    stored: ObjectHeader
    buffer: mmap.mmap


class Seen(NamedTuple):
    """What there is of an object, and what is wrong with it.

    Args:
        nbytes: as it lies in the tier; 0: it is not there.
        header: as it lies there; None: it has none that can be read.
        problem: in words; empty where it is whole.
    """

    nbytes: int
    header: ObjectHeader | None
    problem: str


class Singly(Carrier):
    """What moves a tier's objects one by one; the arguments are those of `Backing`."""

    def seen(self, key: bytes, part: int) -> object:
        """What tells the object that is there now from all others of its name."""
        return self._seen(key, part)

    async def verify(self, key: bytes, part: int, nbytes: int) -> bool | None:
        """Read one object as it is stored; whether it is good. Nobody waits for it.

        None: it went meanwhile or was cleared, or the tier cannot be read.
        """
        name, stored_as = identity(key, part), self._name(key, part)
        seen, bad = self._seen(key, part), False

        def work() -> Read:
            if stored_as is None:
                return Read(Outcome.MISS)
            with self._scratch.buffer(nbytes) as stored:
                length = self._ask(stored_as, stored)  # alone, so it says nothing of the link
                if isinstance(length, Outcome):
                    return Read(length)
                return Read(Outcome.HIT, self._checked(stored[:length], name), length)

        async def read() -> Read:
            nonlocal bad
            try:
                found = await self._calls.call("check", work)
            except (CorruptObject, Incompatible):
                bad = self._stands(key, part, seen)
                raise
            bad = found.header is None and self._stands(key, part, seen)
            return found

        good = await self._judge(key, part, read) is not None
        return good or (False if bad else None)

    def _stands(self, key: bytes, part: int, seen: object) -> bool:
        """Whether that object is still there."""
        return self._seen(key, part) == seen

    async def take(self, key: bytes, part: int, most_bytes: int) -> Taken | None:
        """Read one object as it is raw, verified; None when it cannot be had, which is counted.

        Args:
            key: of the chunk.
            part: which of its objects.
            most_bytes: of the raw object; a larger one is none.
        """
        name, stored_as = identity(key, part), self._name(key, part)
        taken: list[Taken] = []

        def work() -> Read:
            stat = self._stat_of(stored_as)
            if not isinstance(stat, Stat):
                return Read(stat)
            assert stored_as is not None
            with self._scratch.buffer(stat.nbytes) as room:
                length = self._ask(stored_as, room)
                if isinstance(length, Outcome):
                    return Read(length)
                stored = verify_object(room[:length], name, checksum_of(length))
                nbytes = stored_bytes(stored.raw_length)
                if nbytes > most_bytes:
                    raise UsageError(f"{nbytes} bytes when raw; {most_bytes} at most")
                buffer = self._scratch.take(nbytes)
                data = memoryview(buffer)[:nbytes]
                try:
                    read = self._restored(room[:length], name, data, checksum_of(length))
                except BaseException:
                    self._scratch.give(buffer)
                    raise
                assert read.header is not None
                taken.append(Taken(data, read.header, stored, buffer))
            return read

        header = await self._judge(key, part, lambda: self._calls.call("copy", work))
        if header is None and taken:  # it came after it had been given up
            self.give(taken.pop())
        return taken[0] if taken else None

    def give(self, taken: Taken) -> None:
        """Nobody reads or writes what was taken any more."""
        self._scratch.give(taken.buffer)

    async def put(
        self, key: bytes, data: memoryview, origin: Origin, choice: Choice | None, *, replaces: bool
    ) -> bool:
        """Store one object and no coarser copies; False if it could not.

        Args:
            key: of the chunk.
            data: the whole object as it is raw, kept still by the caller.
            origin: what is known of it.
            choice: how it is stored, where that makes it smaller; None: as it is.
            replaces: whether it takes the place of one that is there.
        Raises:
            CorruptObject: ``data`` is not what its writer made a checksum of.
        """
        writing = Writing(key, replaces=replaces)
        self._writes.add(writing)
        try:
            if not await self._may_write():
                return False
            return await self._write(writing, data, origin, choice, 0, lambda: None)
        finally:
            self._writes.discard(writing)

    @abstractmethod
    async def remove(self, key: bytes, part: int, seen: Any, cause: Cause) -> bool:
        """Remove an object and its coarser copies, unless it has been replaced since it was seen.

        Returns:
            Whether it has gone.
        Raises:
            TierUnavailable: the tier could not be told.
        """

    async def look(self, key: bytes, part: int) -> Seen:
        """See what there is of an object; changes nothing, whatever that is.

        Raises:
            TierUnavailable: the tier cannot be asked.
        """
        name, stored_as = identity(key, part), self._name(key, part)

        def work() -> Seen:
            stat = self._stat_of(stored_as)
            if stat is Outcome.MISS or stored_as is None:
                return Seen(0, None, "it is not there")
            if not isinstance(stat, Stat):
                return Seen(0, None, "the tier cannot read it")
            with self._scratch.buffer(stat.nbytes) as room:
                length = self._ask(stored_as, room)
                if isinstance(length, Outcome):
                    return Seen(stat.nbytes, None, "the tier cannot read it")
                header: ObjectHeader | None = None
                problem = ""
                try:
                    header = decode_header(room[:HEADER_BYTES])
                    self._checked(room[:length], name)
                except (CorruptObject, Incompatible, UsageError) as error:
                    problem = str(error)
                return Seen(length, header, problem)

        return await self._calls.call("check", work)

    def _stat_of(self, stored_as: bytes | None) -> Stat | Outcome:
        """How large an object is; blocks."""
        if stored_as is None:
            return Outcome.MISS
        (stat,) = self.tier.stat([stored_as])
        return stat


def unreachable(backing: Singly) -> TierUnavailable:
    """The error of work that a tier which is off has ended."""
    return TierUnavailable(f"{backing.name}: {backing.state}")
