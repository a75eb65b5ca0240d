"""What has left the node's own tiers: remembered for a while, so that a miss can be explained.

Of a chunk its last departure is kept, as a number under the first 8 bytes of its key. What is in a
tier is remembered, too: a clear says only that a whole tier is empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

from kvstrata.node.common.changes import Cause
from kvstrata.node.common.spares import Name
from kvstrata.parts import MAX_PART
from kvstrata.tables import Queue

REMEMBERED = 1 << 16
"""Chunks whose departure is remembered, and as many that entered last: 32 MiB at most."""
EMPTYINGS = 64
"""Clears of whole tiers that are remembered."""
NAME_BYTES = 8
STEP_S = 1e-3
"""Moments are remembered in whole ones of these."""

_CAUSES = tuple(Cause)
_TIER_BITS = _CAUSE_BITS = 8


class Departure(NamedTuple):
    """How a chunk left: from which tier, why, and when by the node's clock."""

    tier: str
    cause: Cause
    at: float


class Departures:
    """A `Watcher` that knows why chunks are not there any more.

    Args:
        clock: monotonic seconds.
        most: chunks that are remembered.
    """

    def __init__(self, clock: Callable[[], float], most: int = REMEMBERED) -> None:
        self._clock = clock
        self._most = most
        self._began = clock()
        self._tiers: list[str] = []
        # The order in which things happened: how often something entered or was emptied.
        self._turn = 0
        self._emptied: deque[tuple[int, int, float]] = deque(maxlen=EMPTYINGS)  # turn, tier, when
        self._held: Queue[int] = Queue()  # turn of the last word, bits of tiers
        self._gone: Queue[int] = Queue()  # milliseconds, tier, cause

    # as a watcher

    def entered(self, tier: str, key: bytes, part: int) -> None:
        """See `Watcher`."""
        if part > MAX_PART:
            return  # a coarser copy goes with the object itself
        name = name_of(key)
        self._turn += 1
        self._hold(name, self._tiers_of(name) | 1 << self._number(tier))

    def found(self, tier: str, names: Sequence[Name]) -> None:
        """See `Watcher`."""
        self._turn += 1
        bit, held = 1 << self._number(tier), self._held
        alone = self._turn << _TIER_BITS | bit
        for name in [name_of(key) for key, part in names if part <= MAX_PART]:
            if name in held:
                self._hold(name, self._tiers_of(name) | bit)
            else:
                held[name] = alone
        while len(held) > self._most:
            held.popitem(last=False)

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        """See `Watcher`."""
        if part > MAX_PART or cause is Cause.SPENT:
            return
        name, number = name_of(key), self._number(tier)
        self._hold(name, self._tiers_of(name) & ~(1 << number))
        self._note(name, number, cause, self._clock())

    def emptied(self, tier: str) -> None:
        """See `Watcher`."""
        self._turn += 1
        self._emptied.append((self._turn, self._number(tier), self._clock()))

    # asked

    def among(self, names: Set[bytes]) -> set[bytes]:
        """Which of these chunks may have left."""
        return {name for name in names if name in self._gone or name in self._held}

    def of(self, name: bytes) -> Departure | None:
        """How a chunk that is in none of the tiers left the last of them; None: nobody knows."""
        self._hold(name, self._tiers_of(name))
        if (packed := self._gone.get(name)) is None:
            return None
        rest, cause = divmod(packed, 1 << _CAUSE_BITS)
        when, number = divmod(rest, 1 << _TIER_BITS)
        return Departure(self._tiers[number], _CAUSES[cause], self._began + when * STEP_S)

    def since(self, key: bytes, begin: float) -> Departure | None:
        """How a chunk left a tier after this moment, whatever came into one since."""
        last = self.of(name_of(key))
        return last if last is not None and last.at > begin - STEP_S else None

    @property
    def cleared_at(self) -> float | None:
        """When a whole tier was cleared last; None: never."""
        return self._emptied[-1][2] if self._emptied else None

    # how

    def _number(self, tier: str) -> int:
        if tier not in self._tiers:
            self._tiers.append(tier)
        return self._tiers.index(tier)

    def _tiers_of(self, name: bytes) -> int:
        """The tiers that a chunk is in, once it is noted from which it was cleared."""
        if not (held := self._held.get(name)):
            return 0
        turn, tiers = divmod(held, 1 << _TIER_BITS)
        if tiers and self._emptied and self._emptied[-1][0] > turn:
            for emptied, number, at in self._emptied:
                if emptied > turn and tiers >> number & 1:
                    tiers &= ~(1 << number)
                    self._note(name, number, Cause.CLEARED, at)
        return tiers

    def _hold(self, name: bytes, tiers: int) -> None:
        if not tiers:
            self._held.pop(name)
            return
        if name in self._held:
            self._held.move_to_end(name)
        self._held[name] = self._turn << _TIER_BITS | tiers
        if len(self._held) > self._most:
            self._held.popitem(last=False)

    def _note(self, name: bytes, number: int, cause: Cause, at: float) -> None:
        when = int((at - self._began) / STEP_S)
        self._gone[name] = (when << _TIER_BITS | number) << _CAUSE_BITS | _CAUSES.index(cause)
        self._gone.move_to_end(name)
        if len(self._gone) > self._most:
            self._gone.popitem(last=False)


def name_of(key: bytes) -> bytes:
    """What a chunk is remembered by."""
    return key[:NAME_BYTES]
