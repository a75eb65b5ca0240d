"""What a node has seen in a shared store: worth asking for, for a while, and never the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from kvstrata.node.service.names import Where
from kvstrata.tables import Queue

LIFE_S = 10.0
"""For which a hint makes another question needless; a read of what has gone by then is a miss."""
REFUSAL_S = 60.0
MAX_HINTS, MAX_REFUSED = 1 << 16, 1 << 12


class Hint(NamedTuple):
    """An object that seems to be there.

    Args:
        where: the rest of its name.
        nbytes: its size as stored; a guess if it was not asked for itself.
        until: when the hint has been one for too long.
    """

    where: Where
    nbytes: int
    until: float


_NONE: Mapping[int, Hint] = {}


class Hints:
    """The hints of one shared tier, the latest ones; lives on the node's loop.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._chunks: Queue[dict[int, Hint]] = Queue()  # the oldest first
        self._num_hints = 0
        self._refused: dict[tuple[bytes, int, Where], float] = {}

    def __len__(self) -> int:
        return self._num_hints

    def fresh(self, key: bytes, part: int, orders: Iterable[str] | None) -> Hint | None:
        """What may be said to be there now, in one of these orders (None: in any)."""
        hint = self.last(key, part)
        if hint is None or self._clock() >= hint.until:
            return None
        return hint if orders is None or hint.where.order in orders else None

    def last(self, key: bytes, part: int) -> Hint | None:
        """The last word on an object, however old."""
        return (self._chunks.get(key) or _NONE).get(part)

    def of(self, key: bytes) -> Iterable[tuple[int, Hint]]:
        """The last word on each object of a chunk."""
        return (self._chunks.get(key) or _NONE).items()

    def note(self, key: bytes, part: int, where: Where, nbytes: int) -> None:
        """An object was seen, or must be there."""
        if self._refused and self._clock() < self._refused.get((key, part, where), 0.0):
            return
        chunk = self._chunks.pop(key) or {}
        self._num_hints += part not in chunk
        chunk[part] = Hint(where, nbytes, self._clock() + LIFE_S)
        self._chunks[key] = chunk
        while self._num_hints > MAX_HINTS:
            self.forget_chunk(next(iter(self._chunks)))

    def forget(self, key: bytes, part: int) -> None:
        """An object is not there after all."""
        chunk = self._chunks.get(key) or {}
        if chunk.pop(part, None) is not None:
            self._num_hints -= 1
            if not chunk:
                del self._chunks[key]

    def forget_chunk(self, key: bytes) -> None:
        """None of a chunk's objects is."""
        self._num_hints -= len(self._chunks.pop(key) or _NONE)

    def refuse(self, key: bytes, part: int, where: Where) -> None:
        """An object is there that is of no use here: do not find it again so soon."""
        self.forget(key, part)
        self._refused[key, part, where] = self._clock() + REFUSAL_S
        while len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]

    def clear(self) -> None:
        """Nothing that was seen is there any more."""
        self._chunks, self._num_hints = Queue(), 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless the count is right and within its bound."""
        assert self._num_hints == sum(map(len, self._chunks.values())) <= MAX_HINTS
        assert all(self._chunks.values())
