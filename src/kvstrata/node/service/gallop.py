"""Where a row ends of which only the beginning is there, in few rounds of a few questions.

A prefix was stored head first, so if its chunk 400 is there the ones before it are too; a hole that
eviction made is found by the read. In each round as many places are asked for at once as a store
answers well, spread over what is still open: 16 of them find the end of 4,000 chunks in 3 rounds.
"""

from __future__ import annotations

from collections.abc import Mapping


class Gallop:
    """The search for how many of ``count`` leading items are there.

    At least ``low`` are, as far as is known, and at most ``high``.
    """

    def __init__(self, count: int) -> None:
        self.low, self.high = 0, count

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to ask."""
        return self.low >= self.high

    def places(self, width: int) -> list[int]:
        """Numbers of the items to ask for next, ``width`` at most: the next and the last are there.

        So a row that is there from end to end, or not at all, is known after one round.
        """
        open_ = self.high - self.low
        if open_ <= width:
            return list(range(self.low, self.high))
        if width == 1:
            return [self.low + open_ // 2]
        return [self.low + (open_ - 1) * i // (width - 1) for i in range(width)]

    def learn(self, there: Mapping[int, bool]) -> None:
        """Take in the answers. Where they contradict each other the row ends at the first hole."""
        for place in sorted(there):
            if not there[place]:
                self.high = min(self.high, place)
                break
            self.low = max(self.low, place + 1)
        self.low = min(self.low, self.high)
