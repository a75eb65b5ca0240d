"""The simplest tier there can be: objects in this process's memory, encoded as a rule."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvstrata.errors import TierUnavailable
from kvstrata.layout import Bytes
from kvstrata.tiers.base import Found, Outcome, Tier


class MemoryTier(Tier):
    """Copies of objects in this process's memory, unbounded.

    Args:
        clock: Unix seconds, for the last use of an object.
    """

    name = "memory"

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._objects: dict[bytes, tuple[Bytes, float]] = {}  # least recently used first
        self._epoch = 0
        self._closed = False

    @property
    def epoch(self) -> int:
        return self._epoch

    def contains(self, ids: Sequence[bytes]) -> list[Outcome]:
        with self._open():
            return [self._outcome(object_id in self._objects) for object_id in ids]

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[Outcome]:
        with self._open():
            found = [self._objects.get(object_id) for object_id in ids]
        outcomes = []
        for entry, buffer in zip(found, into, strict=True):
            if entry is None:
                outcomes.append(Outcome.MISS)
            elif len(entry[0]) != len(buffer):
                outcomes.append(Outcome.FAILED)
            else:
                np.copyto(np.frombuffer(buffer, np.uint8), entry[0])
                outcomes.append(Outcome.HIT)
        return outcomes

    def write(self, objects: Sequence[tuple[bytes, memoryview]]) -> list[Outcome]:
        # numpy copies without holding the interpreter's lock.
        copies = [(object_id, np.frombuffer(data, np.uint8).copy()) for object_id, data in objects]
        with self._open():
            for object_id, data in copies:
                self._objects.pop(object_id, None)
                self._objects[object_id] = (data, self._clock())
        return [Outcome.HIT] * len(copies)

    def delete(self, ids: Sequence[bytes]) -> list[Outcome]:
        with self._open():
            return [
                self._outcome(self._objects.pop(object_id, None) is not None) for object_id in ids
            ]

    def touch(self, ids: Sequence[bytes]) -> None:
        with self._open():
            for object_id in ids:
                entry = self._objects.pop(object_id, None)
                if entry is not None:
                    self._objects[object_id] = (entry[0], self._clock())

    def scan(self) -> Iterator[list[Found]]:
        with self._open():
            found = [Found(i, len(data), used) for i, (data, used) in self._objects.items()]
        if found:
            yield found

    def clear(self) -> None:
        with self._open():
            self._objects.clear()
            self._epoch += 1

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._objects.clear()

    def _open(self) -> threading.Lock:
        if self._closed:
            raise TierUnavailable("memory: the tier is closed")
        return self._lock

    @staticmethod
    def _outcome(done: bool) -> Outcome:
        return Outcome.HIT if done else Outcome.MISS
