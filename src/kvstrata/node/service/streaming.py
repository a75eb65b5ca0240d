"""Loading within a target: chunk by chunk the finest copy that a slow tier can bring in time.

A tier may keep coarser copies of an object beside the one its codec makes (its levels, 0 the
finest). A load then begins each chunk at the finest level at which this one and all behind it
would arrive in time, at the bandwidth measured just now; so a link that slows down on the way
costs quality, not time. Where not even the coarsest is in time and computing the rest is faster
than loading it, the load ends early and the engine computes.

Source: CacheGen, arXiv:2310.07240, section 5.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

AHEAD_S = 0.01
"""What may be under way, in seconds of the link and beyond what one read takes by itself: what was
begun cannot be made coarser."""
AT_LEAST = 2


class Stream:
    """The load of one prompt's objects from one tier, head first; lives on the node's loop.

    Args:
        ends_at: when the last byte should be here.
        compute_s: what the engine takes to compute the KV of an object; `inf` while unknown.
        bytes_per_s: asks what the tier brings to this load; None while unknown, 0 if it is off.
        width: objects under way at once, at most.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        ends_at: float,
        compute_s: float,
        bytes_per_s: Callable[[], float | None],
        width: int,
        clock: Callable[[], float],
    ) -> None:
        self.levels: list[int | None] = []  # of the objects that had their turn, None: given up
        self._sizes: list[Sequence[float] | None] = []  # None: no longer wanted
        self._turns: list[Callable[[int | None], None]] = []
        self._num_left = 0
        # Of those that had no turn yet and are wanted, by level: bytes, and how many lack it.
        self._left_bytes: list[float] = []
        self._lacking: list[int] = []
        self._ends_at = ends_at
        self._compute_s = compute_s
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._width = width
        self._under_way: dict[int, tuple[float, float]] = {}  # its bytes, and when it was begun
        self._shortest_s = 0.0  # of the reads so far

    def add(self, sizes: Sequence[float], turn: Callable[[int | None], None]) -> int:
        """A further object, behind the others; its number. `begin` when all are added.

        Args:
            sizes: encoded bytes at each level, finest first; `inf`: it has none.
            turn: is called when it may be read, with the level, or None: it is not to be read.
        """
        self._left_bytes = self._left_bytes or [0.0] * len(sizes)
        self._lacking = self._lacking or [0] * len(sizes)
        self._sizes.append(sizes)
        self._turns.append(turn)
        self._count(sizes, 1)
        return len(self._sizes) - 1

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way or still to come."""
        return not self._num_left and not self._under_way

    def begin(self) -> None:
        """Give their turn to the next objects, as many as may be under way."""
        while self._num_left and self._may_begin():
            number = len(self.levels)
            sizes = self._sizes[number]
            if sizes is None:
                self.levels.append(None)
                continue
            level = self._pick(number)
            if level is None:
                self._give_up(number)
            else:
                self.levels.append(level)
                self._count(sizes, -1)
                self._under_way[number] = sizes[level], self._clock()
                self._turns[number](level)

    def done(self, number: int) -> None:
        """An object has come, or will not, or is no longer wanted."""
        begun = self._under_way.pop(number, None)
        if begun is not None:
            took = self._clock() - begun[1]
            self._shortest_s = min(took, self._shortest_s or took)
            self.begin()
        elif number >= len(self.levels) and (sizes := self._sizes[number]) is not None:
            self._sizes[number] = None
            self._count(sizes, -1)

    def _count(self, sizes: Sequence[float], sign: int) -> None:
        """An object is left to be begun (1), or not any more (-1)."""
        self._num_left += sign
        for level, nbytes in enumerate(sizes):
            if math.isinf(nbytes):
                self._lacking[level] += sign
            else:
                self._left_bytes[level] += sign * nbytes

    def _give_up(self, number: int) -> None:
        """Read no more from this object on."""
        rest = [at for at in range(number, len(self._sizes)) if self._sizes[at] is not None]
        self.levels += [None] * (len(self._sizes) - number)
        self._num_left = 0
        self._left_bytes, self._lacking = [0.0] * len(self._lacking), [0] * len(self._lacking)
        for at in rest:
            self._turns[at](None)

    def _may_begin(self) -> bool:
        count, rate = len(self._under_way), self._bytes_per_s()
        if count < AT_LEAST or rate is None:
            return count < self._width
        most = rate * (AHEAD_S + self._shortest_s)
        return count < self._width and self._waiting_bytes() < most

    def _pick(self, number: int) -> int | None:
        rate = self._bytes_per_s()
        if rate is None:
            return 0
        if not rate:
            return None
        left = self._ends_at - self._clock()
        waiting = self._waiting_bytes()
        # How long until all is here, if this object and those behind it came at each level.
        times = [
            math.inf if lacking else (waiting + nbytes) / rate
            for nbytes, lacking in zip(self._left_bytes, self._lacking, strict=True)
        ]
        for level, seconds in enumerate(times):
            if seconds <= left:
                return level
        fastest = min(range(len(times)), key=times.__getitem__)
        computed = waiting / rate + self._compute_s * self._num_left
        # The first one is read in any case: nothing else would ever notice that a link has come
        # to its senses.
        give_up = number > 0 and computed < times[fastest]
        return None if give_up or math.isinf(times[fastest]) else fastest

    def _waiting_bytes(self) -> float:
        return sum(nbytes for nbytes, _ in self._under_way.values())
