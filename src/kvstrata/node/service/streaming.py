"""Loading within a target: chunk by chunk the finest copy that a slow tier can bring in time.

A tier may keep coarser copies of an object beside the one its codec makes (its levels, 0 the
finest). A load then begins each chunk at the finest level at which this one and all behind it
would arrive in time, at the bandwidth measured just now; so a link that slows down on the way
costs quality, not time. Where not even the coarsest is in time and computing the rest is faster
than loading it, the load ends early and the engine computes.

Source: CacheGen, arXiv:2310.07240, section 5.3.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

AHEAD_S = 0.01
"""What may be under way, in seconds of the link and beyond what one read takes by itself: what was
begun cannot be made coarser."""
AT_LEAST = 2


class Stream:
    """The load of one prompt's objects from one tier, head first; lives on the node's loop.

    Args:
        sizes: of each object: encoded bytes at each level, finest first; `inf`: it has none.
        ends_at: when the last byte should be here.
        compute_s: what the engine takes to compute the KV of an object; `inf` while unknown.
        bytes_per_s: asks what the tier brings to this load; None while unknown, 0 if it is off.
        width: objects under way at once, at most.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        ends_at: float,
        compute_s: float,
        bytes_per_s: Callable[[], float | None],
        width: int,
        clock: Callable[[], float],
    ) -> None:
        self.levels: list[int | None] = []  # of the chunks that were begun, None: given up
        self._sizes = sizes
        self._ends_at = ends_at
        self._compute_s = compute_s
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._width = width
        self._under_way: dict[int, tuple[float, float]] = {}  # its bytes, and when it was begun
        self._shortest_s = 0.0  # of the reads so far
        self._turns = [asyncio.Event() for _ in sizes]

    def start(self) -> None:
        """Let the first objects begin."""
        self._begin()

    async def turn(self, number: int) -> int | None:
        """Wait until a chunk may be read; its level, or None if it is not to be read at all."""
        await self._turns[number].wait()
        return self.levels[number]

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way or still to come."""
        return len(self.levels) == len(self._sizes) and not self._under_way

    def done(self, number: int) -> None:
        """A chunk has come, or will not."""
        begun = self._under_way.pop(number, None)
        if begun is not None:
            took = self._clock() - begun[1]
            self._shortest_s = min(took, self._shortest_s or took)
            self._begin()

    def _begin(self) -> None:
        """Begin the next chunks, as many as may be under way."""
        while len(self.levels) < len(self._sizes) and self._may_begin():
            number = len(self.levels)
            level = self._pick(number)
            if level is None:
                self.levels += [None] * (len(self._sizes) - number)
            else:
                self.levels.append(level)
                self._under_way[number] = self._sizes[number][level], self._clock()
            for turn in self._turns[number : len(self.levels)]:
                turn.set()

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
        rest = self._sizes[number:]
        # How long until all is here, if this chunk and those behind it came at each level.
        times = [(waiting + sum(level)) / rate for level in zip(*rest, strict=True)]
        for level, seconds in enumerate(times):
            if seconds <= left:
                return level
        fastest = min(range(len(times)), key=times.__getitem__)
        computed = waiting / rate + self._compute_s * len(rest)
        # The first one is read in any case: nothing else would ever notice that a link has come
        # to its senses.
        give_up = number > 0 and computed < times[fastest]
        return None if give_up or math.isinf(times[fastest]) else fastest

    def _waiting_bytes(self) -> float:
        return sum(nbytes for nbytes, _ in self._under_way.values())
