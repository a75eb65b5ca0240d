"""The simplest tier there can be: objects in this process's memory, encoded as a rule."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvstrata.errors import TierUnavailable
from kvstrata.layout import Bytes
from kvstrata.objects import HEADER_BYTES
from kvstrata.tables import Queue
from kvstrata.tiers.base import Found, Outcome, OwnedTier, Put, Stat


@dataclass(slots=True)
class _Object:
    """What is kept of an object."""

    data: Bytes
    version: str
    last_used: float


class MemoryTier(OwnedTier):
    """Copies of objects in this process's memory, unbounded.

    Args:
        clock: Unix seconds, for the last use of an object.
    """

    name = "memory"

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._objects: Queue[_Object] = Queue()  # least recently used first
        self._num_writes = 0
        self._epoch = 0
        self._closed = False

    @property
    def epoch(self) -> int:
        return self._epoch

    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        with self._open():
            found = [self._objects.get(object_id) for object_id in ids]
        return [Stat(len(one.data), "", one.version) if one else Outcome.MISS for one in found]

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        with self._open():
            found = [self._objects.get(object_id) for object_id in ids]
        answers: list[int | Outcome] = []
        for one, buffer in zip(found, into, strict=True):
            if one is None:
                answers.append(Outcome.MISS)
            elif len(one.data) > len(buffer):
                answers.append(Outcome.FAILED)
            else:
                np.copyto(np.frombuffer(buffer, np.uint8, len(one.data)), one.data)
                answers.append(len(one.data))
        return answers

    def headers(self, ids: Sequence[bytes]) -> list[bytes | Outcome]:
        with self._open():
            found = [self._objects.get(object_id) for object_id in ids]
        return [one.data[:HEADER_BYTES].tobytes() if one else Outcome.MISS for one in found]

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        copies = [_copy(put) for put in puts]
        outcomes = []
        with self._open():
            for put, data in zip(puts, copies, strict=True):
                if put.if_absent and put.object_id in self._objects:
                    outcomes.append(Outcome.MISS)
                    continue
                self._num_writes += 1
                self._objects.pop(put.object_id)
                self._objects[put.object_id] = _Object(data, str(self._num_writes), self._clock())
                outcomes.append(Outcome.HIT)
        return outcomes

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        outcomes = []
        with self._open():
            for object_id, version in zip(ids, versions or [""] * len(ids), strict=True):
                one = self._objects.get(object_id)
                gone = one is not None and version in ("", one.version)
                if gone:
                    del self._objects[object_id]
                outcomes.append(Outcome.HIT if gone else Outcome.MISS)
        return outcomes

    def touch(self, ids: Sequence[bytes]) -> None:
        with self._open():
            for object_id in ids:
                one = self._objects.get(object_id)
                if one is not None:
                    one.last_used = self._clock()
                    self._objects.move_to_end(object_id)

    def scan(self) -> Iterator[list[Found]]:
        with self._open():
            found = [Found(i, len(one.data), one.last_used) for i, one in self._objects.items()]
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


def _copy(put: Put) -> Bytes:
    """The whole object; numpy copies without holding the interpreter's lock."""
    data = np.empty(put.nbytes, np.uint8)
    start = len(put.header_page)
    np.copyto(data[:start], np.frombuffer(put.header_page, np.uint8))
    if put.payload:
        np.copyto(data[start:], np.frombuffer(put.payload, np.uint8))
    return data
