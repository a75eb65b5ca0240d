"""When objects came into a tier, to the minute: told by their generations, at no cost for each."""

from __future__ import annotations

from bisect import bisect_right

EVERY_NS = 60 * 10**9
MAX_DATES = 4096


class Ages:
    """Dates of some generations, which count up as objects come."""

    def __init__(self) -> None:
        self._generations: list[int] = []
        self._dates_ns: list[int] = []

    def note(self, generation: int, now_ns: int) -> None:
        """This generation is of now."""
        if self._dates_ns and now_ns < self._dates_ns[-1] + EVERY_NS:
            return
        self._generations.append(generation)
        self._dates_ns.append(now_ns)
        if len(self._dates_ns) > MAX_DATES:  # of the older ones every other will do
            del self._generations[: MAX_DATES // 2 : 2]
            del self._dates_ns[: MAX_DATES // 2 : 2]

    def surely_before(self, generation: int, before_ns: int) -> bool:
        """Whether an object of this generation had come before that time, for sure."""
        later = bisect_right(self._generations, generation)
        return later < len(self._dates_ns) and self._dates_ns[later] <= before_ns
