"""What the index of an owned tier knows to be covered by a mark, taken out in slices."""

from __future__ import annotations

from collections.abc import Awaitable

from kvstrata.node.common.changes import Cause
from kvstrata.node.common.index import Index
from kvstrata.node.common.slices import Work, in_slices
from kvstrata.node.service.ages import Ages
from kvstrata.node.service.entries import generation_of
from kvstrata.node.service.removals import Removals
from kvstrata.tiers.marks import UNKNOWN, Mark

SLICE = 16


class Striking:
    """Takes out what is covered by marks.

    Args:
        index: of the tier.
        removals: delete what is taken out.
    """

    def __init__(self, index: Index[int], removals: Removals) -> None:
        self.ages = Ages()
        self._index = index
        self._removals = removals

    def begin(self, mark: Mark, aged: bool) -> Awaitable[int] | int:
        """Take out what is here now; how many objects, once they are deleted.

        Args:
            mark: what covers it.
            aged: whether some of it may be younger; then what may be is left to be read.
        """
        return in_slices(self._work(mark, list(self._index.keys()), aged))

    def _work(self, mark: Mark, keys: list[bytes], aged: bool) -> Work[int]:
        removals, count = [], 0
        for number, key in enumerate(keys, 1):
            whose = self._index.whose(key)
            if (
                whose != UNKNOWN
                and mark.fits(whose)
                and not (aged and self._may_be_young(key, mark))
            ):
                names = self._removals.condemn_chunk(key, Cause.CLEARED)
                count += len(names)
                removals.append(self._removals.run(names))
            if number % SLICE == 0:
                yield None
        yield from removals
        return count

    def _may_be_young(self, key: bytes, mark: Mark) -> bool:
        return not all(
            self.ages.surely_before(generation_of(entry), mark.before_ns)
            for _, entry in self._index.objects(key)
        )
