"""Marks: what was cleared by whose it is, what it belongs to, or how old it is.

A mark stands for all objects of before a moment that it fits. Each header that is read is held
against the marks of its tier, so what nobody knew of when it was cleared is a miss all the same:
what a scan found, what a store held that was off, what another node sends.

Clocks of a fleet differ. What was created up to `MARGIN_NS` after the moment counts as before it,
which costs a miss at most; who knows of a mark dates what he stores behind that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvstrata.header import NOBODY
from kvstrata.objects import CREATED_FIELD, NAMESPACE_FIELD, OWNER_FIELD

MARGIN_NS = 60 * 10**9
MAX_MARKS = 1024
"""Of one tier. Beyond it the two oldest become one that fits all that either fits, and more."""
MAX_IN_EPOCH = 64
"""Likewise, of those that a shared store keeps."""

_LINE = re.compile(rb"mark (0|[1-9][0-9]{0,19}) ([0-9a-f]{32}|-) ([0-9a-f]{64}|-)\n")


class Whose(NamedTuple):
    """Whose an object is, 16 bytes, and what it belongs to, 32 bytes; empty: not known."""

    owner: bytes
    namespace: bytes


UNKNOWN = Whose(b"", b"")


class Mark(NamedTuple):
    """What was cleared.

    Args:
        owner: whose objects, 16 bytes; empty: anybody's. One that is nobody's in particular may be
            anybody's, and counts.
        namespace: of which namespace, 32 bytes; empty: of any.
        before_ns: created before it, nanoseconds since 1970.
    """

    owner: bytes
    namespace: bytes
    before_ns: int

    def fits(self, whose: Whose) -> bool:
        """Whether it is about objects like this, whatever their age."""
        return (not self.owner or whose.owner in (self.owner, NOBODY)) and (
            not self.namespace or whose.namespace == self.namespace
        )

    def covers(self, whose: Whose, created_ns: int) -> bool:
        """Whether such an object counts as cleared."""
        return created_ns < self.before_ns + MARGIN_NS and self.fits(whose)

    def encode(self) -> bytes:
        """One line."""
        owner, namespace = self.owner.hex() or "-", self.namespace.hex() or "-"
        return f"mark {self.before_ns} {owner} {namespace}\n".encode()


class Marks:
    """The marks of one tier: one for all clears of the same kind.

    Other threads may ask, while one changes them.

    Args:
        marks: to begin with.
        most: how many there may be.
    """

    def __init__(self, marks: Iterable[Mark] = (), most: int = MAX_MARKS) -> None:
        self._most = most
        self._marks: dict[Whose, int] = {}  # the oldest first; never changed in place
        for mark in marks:
            self.add(mark)

    def __iter__(self) -> Iterator[Mark]:
        return (Mark(*whose, before_ns) for whose, before_ns in self._marks.items())

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, mark: Mark) -> None:
        """Count what it covers as cleared from now on."""
        marks, whose = dict(self._marks), Whose(mark.owner, mark.namespace)
        marks[whose] = max(mark.before_ns, marks.pop(whose, 0))
        self._marks = marks
        if len(marks) > self._most:
            (one, one_ns), (other, other_ns) = list(marks.items())[:2]
            del marks[one], marks[other]
            both = Mark(
                one.owner if one.owner == other.owner else b"",
                one.namespace if one.namespace == other.namespace else b"",
                max(one_ns, other_ns),
            )
            self.add(both)

    def covers(self, whose: Whose, created_ns: int) -> bool:
        """Whether such an object counts as cleared."""
        return any(created_ns < before_ns + MARGIN_NS for before_ns in self._fitting(whose))

    def covers_page(self, page: memoryview) -> bool:
        """The same of an object by its header page, which was checked before."""
        created_ns = int.from_bytes(page[CREATED_FIELD], "little")
        return bool(self._marks) and self.covers(whose_of(page), created_ns)

    def date(self, whose: Whose, now_ns: int) -> int:
        """When something is created that is stored now: not before what has been cleared."""
        return max([now_ns, *(before_ns + MARGIN_NS for before_ns in self._fitting(whose))])

    def _fitting(self, whose: Whose) -> list[int]:
        """The moments of the marks that are about objects like this."""
        marks = self._marks
        if whose.owner == NOBODY:  # which may be anybody's
            return [mark.before_ns for mark in self if mark.fits(whose)]
        names = [
            Whose(owner, namespace)
            for owner in (whose.owner, b"")
            for namespace in (whose.namespace, b"")
        ]
        return [marks[name] for name in names if name in marks]

    def forget(self, marks: Iterable[Mark]) -> None:
        """Drop those of these marks that have not been renewed."""
        gone = set(marks)
        self._marks = {Whose(*mark[:2]): mark.before_ns for mark in self if mark not in gone}

    def clear(self) -> None:
        """Nothing of before the marks is there any more."""
        self._marks = {}


def whose_of(page: memoryview) -> Whose:
    """Whose an object is, by its header page."""
    return Whose(bytes(page[OWNER_FIELD]), bytes(page[NAMESPACE_FIELD]))


def decode_marks(lines: bytes) -> tuple[Mark, ...] | None:
    """What `Mark.encode` wrote, one after the other; None where it is anything else."""
    marks: list[Mark] = []
    while lines:
        found = _LINE.match(lines)
        if found is None or len(marks) == MAX_IN_EPOCH:
            return None
        owner, namespace = (
            b"" if one == b"-" else bytes.fromhex(one.decode()) for one in found.group(2, 3)
        )
        marks.append(Mark(owner, namespace, int(found[1])))
        lines = lines[found.end() :]
    return tuple(marks)
