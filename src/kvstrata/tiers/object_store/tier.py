"""The tier in an object store, S3, GCS or Azure, or in a folder that machines share.

An object is an object there, under its epoch and its namespace. Many small questions and many
pieces of large objects are asked for side by side, in threads; obstore does the rest.
"""

from __future__ import annotations

import math
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from obstore.exceptions import PreconditionError

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.base import Epoch, Limits, Outcome, Put, SharedTier, Stat
from kvstrata.tiers.epochs import decode_epoch, encode_epoch, marked, new_epoch
from kvstrata.tiers.marks import Mark
from kvstrata.tiers.object_store.client import REMOVE_BATCH, Got, ObjectClient, Turn, Version
from kvstrata.tiers.object_store.lease import LEASE_S, Lease
from kvstrata.tiers.object_store.paths import EPOCH, folder_of, path_of
from kvstrata.tiers.object_store.side_by_side import SideBySide
from kvstrata.tiers.object_store.sweep import PASS_EVERY_S, Sweep
from kvstrata.tiers.object_store.uses import NOTE_EVERY_S, Notes

ROUND_OBJECTS = 16
RANGE_BYTES = 8 << 20
"""An object that is larger is read in pieces of this size, side by side."""
TIMEOUT_S = 30.0
AGAIN_S = 0.02
"""Within which one tries again whose change met another one."""

A = TypeVar("A")


class ObjectStoreTier(SharedTier):
    """Objects in an object store, or in a shared folder.

    A `write` is one conditional request; nothing that is cut off becomes visible. The version of
    an object is a label that its writer gave it, in a folder the file's ETag. A `delete` of one
    version asks first and deletes then: between the two a fresh copy can be lost, which is a miss.
    In a folder calls have no bound in time, since nobody can end what a file system hangs in.

    Args:
        url: ``s3://bucket/prefix``, ``gs://``, ``az://`` or ``file:///path``.
        capacity_bytes: what a fleet keeps the store to, softly; None: the store's own rules do.
        lasts_s: of an epoch, where this node is the one that begins the store.
        endpoint, region, timeout_s: of the store, see `ObjectClient`.
        lease_s, pass_every_s, note_every_s: of the sweep, see `Lease`, `Sweep`, `Notes`.
        clock: monotonic seconds, of the sweep.
    Raises:
        ConfigError: the URL, or something in the environment, cannot be used.
    """

    name = "object_store"

    def __init__(
        self,
        url: str,
        *,
        capacity_bytes: int | None,
        lasts_s: float = 5.0,
        endpoint: str | None = None,
        region: str | None = None,
        timeout_s: float = TIMEOUT_S,
        lease_s: float = LEASE_S,
        pass_every_s: float = PASS_EVERY_S,
        note_every_s: float = NOTE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = ObjectClient(url, timeout_s, endpoint, region)
        self.limits = Limits(
            batch_objects=64,
            batch_bytes=1 << 30,
            concurrency=128,
            timeout_s=timeout_s if self._client.folder is None else math.inf,
            round_objects=ROUND_OBJECTS,
        )
        self._lasts_s = lasts_s
        self._objects = SideBySide("kvstrata-objects", 4 * ROUND_OBJECTS)
        self._pieces = SideBySide("kvstrata-pieces", 2 * ROUND_OBJECTS)
        self._closed = False
        self._past: list[int] = []  # epochs that are still to be forgotten
        self._marking = threading.Lock()
        self._at_upkeep = threading.Lock()
        self._notes: Notes | None = None
        self._sweep: Sweep | None = None
        if capacity_bytes is not None:
            self.capacity_bytes = capacity_bytes
            self._notes = Notes(self._client, note_every_s, clock)
            lease = Lease(self._client, lease_s, clock)
            self._sweep = Sweep(
                self._client, capacity_bytes, self._present, lease, pass_every_s, clock
            )

    @property
    def sweeps(self) -> bool:
        """Whether it is this node that keeps the fleet to its budget at the moment."""
        return self._sweep is not None and self._sweep.lease.held

    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        turn = self._begin()

        def ask(i: int) -> Stat | Outcome:
            head = self._client.head(path_of(ids[i]), turn)
            return Outcome.MISS if head is None else Stat(head.nbytes, version=head.label)

        return self._each(ids, ask)

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        turn = self._begin()
        return self._each(ids, lambda i: self._read_one(path_of(ids[i]), into[i], turn))

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        turn = self._begin()

        def store(i: int) -> Outcome:
            path, parts = path_of(puts[i].object_id), [puts[i].header_page, puts[i].payload]
            label = secrets.token_hex(8)
            done = self._client.put(path, parts, turn, create=puts[i].if_absent, label=label)
            return Outcome.HIT if done else Outcome.MISS

        return self._each([put.object_id for put in puts], store)

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        turn, wanted = self._begin(), versions or [""] * len(ids)

        def take(i: int) -> Outcome:
            path = path_of(ids[i])
            head = self._client.head(path, turn)
            if head is None or wanted[i] not in ("", head.label):
                return Outcome.MISS
            return Outcome.HIT if self._client.delete(path, turn) else Outcome.MISS

        return self._each(ids, take)

    def epoch(self) -> Epoch:
        return self._epoch(self._begin())

    def begin_epoch(self) -> Epoch:
        turn = self._begin()
        found = self._client.small(EPOCH, turn)
        if found is None:
            return self._epoch(turn)
        begun = new_epoch(decode_epoch(found[0], self._place(EPOCH)).lasts_s)
        if self._client.replace(EPOCH, encode_epoch(begun), found[1].condition, turn):
            return begun
        # Since we asked, another has begun one, or we have and the answer was lost.
        return self._epoch(turn)

    def add_mark(self, mark: Mark) -> Epoch:
        with self._marking:  # those of one node would only be in each other's way
            turn = self._begin()
            while turn.left:
                found = self._client.small(EPOCH, turn)
                if found is None:
                    self._epoch(turn)
                    continue
                after = marked(decode_epoch(found[0], self._place(EPOCH)), mark)
                if self._client.replace(EPOCH, encode_epoch(after), found[1].condition, turn):
                    return after
                time.sleep(random.uniform(0, AGAIN_S))
        raise TierUnavailable(f"{self._place(EPOCH)} is changed by others all the time")

    def forget(self, epoch: int) -> int:
        """See `SharedTier.forget`; what takes longer than a call may, `upkeep` goes on with."""
        return self._forget(epoch, self._begin())

    def touch(self, ids: Sequence[bytes]) -> None:
        if self._notes is not None:
            self._notes.note(ids)

    def upkeep(self) -> None:
        """See `SharedTier.upkeep`; nothing while another call is at it, as when a node ends."""
        turn = self._begin()
        if not self._at_upkeep.acquire(blocking=False):
            return
        try:
            while self._past and turn.left:
                self._forget(self._past.pop(0), turn)
            if self._notes is not None and self._sweep is not None:
                self._notes.write(turn)
                self._sweep.step(turn)
        finally:
            self._at_upkeep.release()

    def close(self) -> None:
        self._closed = True
        self._objects.close()
        self._pieces.close()

    def _begin(self) -> Turn:
        if self._closed:
            raise TierUnavailable("the object store tier is closed")
        return self._client.turn()

    def _place(self, path: str) -> str:
        return f"{self._client.url.rstrip('/')}/{path}"

    def _each(self, ids: Sequence[bytes], work: Callable[[int], A]) -> list[A]:
        """``work`` on the number of each id: side by side, but one after the other on one id."""
        same: dict[bytes, list[int]] = {}
        for i, one in enumerate(ids):
            same.setdefault(one, []).append(i)

        def in_turn(numbers: list[int]) -> list[A]:
            return [work(i) for i in numbers]

        rows, answers = list(same.values()), dict[int, A]()
        for start in range(0, len(rows), ROUND_OBJECTS):
            some = rows[start : start + ROUND_OBJECTS]
            done = self._objects.run([partial(in_turn, numbers) for numbers in some])
            for numbers, found in zip(some, done, strict=True):
                answers.update(zip(numbers, found, strict=True))
        return [answers[i] for i in range(len(ids))]

    def _read_one(self, path: str, into: memoryview, turn: Turn) -> int | Outcome:
        if self._client.folder is not None:
            found = self._client.read_file(path, into)
            if found is None:
                return Outcome.MISS
            return found if 0 < found <= len(into) else Outcome.FAILED
        # Stores answer faster where no range is asked for.
        part = (0, RANGE_BYTES) if len(into) > RANGE_BYTES else None
        first = self._client.get(path, turn, part)
        if first is None:
            return Outcome.MISS
        size, condition = first.head.nbytes, first.head.condition
        if not 0 < size <= len(into):
            return Outcome.FAILED
        into = into[:size]
        pieces = [partial(_fill, first, into[:RANGE_BYTES])]
        pieces += [
            partial(self._read_piece, path, start, into[start:][:RANGE_BYTES], condition, turn)
            for start in range(RANGE_BYTES, size, RANGE_BYTES)
        ]
        outcomes = self._pieces.run(pieces)
        return next((one for one in outcomes if one is not Outcome.HIT), size)

    def _read_piece(
        self, path: str, start: int, into: memoryview, condition: Version, turn: Turn
    ) -> Outcome:
        try:
            got = self._client.get(path, turn, (start, start + len(into)), condition)
        except PreconditionError:  # it has been replaced meanwhile
            return Outcome.FAILED
        return Outcome.MISS if got is None else _fill(got, into)

    def _present(self, turn: Turn) -> int:
        return self._epoch(turn).number

    def _epoch(self, turn: Turn) -> Epoch:
        found = self._client.small(EPOCH, turn)
        if found is None:
            epoch = new_epoch(self._lasts_s)
            if self._client.put(EPOCH, [encode_epoch(epoch)], turn, create=True):
                return epoch
            found = self._client.small(EPOCH, turn)
            if found is None:
                raise TierUnavailable(f"{self._place(EPOCH)} comes and goes; who removes it?")
        return decode_epoch(found[0], self._place(EPOCH))

    def _forget(self, epoch: int, turn: Turn) -> int:
        count, paths, batches = 0, list[str](), self._client.listing(folder_of(epoch))
        while turn.left:
            if not paths and not (paths := [one.path for one in next(batches, [])]):
                return count
            some, paths = paths[:REMOVE_BATCH], paths[REMOVE_BATCH:]
            self._client.remove(some, turn)
            count += len(some)
        self._past.append(epoch)
        return count


def _fill(got: Got, into: memoryview) -> Outcome:
    return Outcome.HIT if got.fill(into) else Outcome.FAILED
