"""The tier in Mooncake Store: what the machines of a fleet lend of their memory.

An object is one of Mooncake's, named by a prefix and its name in hex; it is read into its slot and
written from it without a copy. Mooncake decides where it lies and evicts by itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kvstrata.errors import DeadlineExceeded, TierFull, TierUnavailable
from kvstrata.tiers.base import Epoch, Limits, Outcome, Put, SharedTier, Stat
from kvstrata.tiers.epochs import decode_epoch, encode_epoch, epoch_prefix, new_epoch
from kvstrata.tiers.mooncake import codes
from kvstrata.tiers.mooncake.client import Client, Open
from kvstrata.tiers.mooncake.memory import Loan
from kvstrata.tiers.mooncake.reading import read, sizes_of

HIT, MISS, FAILED = Outcome.HIT, Outcome.MISS, Outcome.FAILED

PATIENCE_S = 5.0
"""For how long a verb tries again what others are in the way of."""
GENTLE_S = 2.0
"""For how long a removal waits for those who may be reading."""
ROOM_S = 0.2
"""For how long a write waits for the master to evict, which it begins when there is no room."""
PAUSE_S = 0.005
ABANDONED_S = 50.0
"""Who fails after so long was given up by the library, which may go on moving its bytes."""

EPOCH_COPIES = 3
EPOCH_BUFFER_BYTES = 4096
"""More than an epoch takes."""


class MooncakeTier(SharedTier):
    """A client of one Mooncake Store, of the objects under a prefix.

    A call ends within `limits.timeout_s`, with two exceptions that the node's own deadlines are
    for. Bytes that come slowly, but come, may take 60 s. And with handshakes between clients
    instead of a metadata server, the first words with a client that hangs take as long. A call
    stays with either, for the library may yet write into its buffer.

    Replacing an object is removing it and storing another: who reads between the two misses.

    Args:
        client: of the store; closed with the tier.
        prefix: what names of objects begin with.
        lasts_s: of a new store's epochs.
    """

    name = "mooncake"
    limits = Limits(batch_objects=1024, timeout_s=15.0)

    def __init__(self, client: Client, prefix: str, lasts_s: float) -> None:
        self._client = client
        self._prefix = prefix
        self._lasts_s = lasts_s
        settings = client.settings
        self._kept = client.replication(settings.replicas, soft=settings.soft_pin)
        # Never evicted, and on several machines: without it the store begins anew.
        self._kept_for_good = client.replication(EPOCH_COPIES, hard=True)

    def bind(self, pool: memoryview) -> None:
        self._client.bind(pool)

    # objects

    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        if not ids:
            return []
        keys = [self._key(one) for one in ids]
        with self._client.use() as current:
            sizes = self._sizes(current.store, keys)
        return [Stat(size) if isinstance(size, int) else size for size in sizes]

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        if not ids:
            return []
        keys, begun = [self._key(one) for one in ids], time.monotonic()
        with self._client.use() as current:
            lengths = read(self._client, current, keys, into)
        self._end_what_was_given_up(current, codes.TRANSFER_FAILED in lengths, begun)
        return [_outcome(length) if length < 0 else length for length in lengths]

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        if not puts:
            return []
        outcomes: list[Outcome] = []
        begun = time.monotonic()
        with self._client.use() as current:
            for put in puts:
                parts = [put.header_page, put.payload]
                key = self._key(put.object_id)
                try:
                    outcome = self._put(current, key, parts, self._kept, put.if_absent, begun)
                except TierFull:
                    if HIT not in outcomes:
                        raise
                    outcome = FAILED
                outcomes.append(outcome)
        self._end_what_was_given_up(current, FAILED in outcomes, begun)
        return outcomes

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        if not ids:
            return []
        # There are no versions here, so none but the empty one is right.
        asked = [i for i in range(len(ids)) if versions is None or not versions[i]]
        outcomes = [MISS] * len(ids)
        with self._client.use() as current:
            removed = self._remove(current.store, [self._key(ids[i]) for i in asked])
        for i, outcome in zip(asked, removed, strict=True):
            outcomes[i] = outcome
        return outcomes

    def touch(self, ids: Sequence[bytes]) -> None:
        if ids:
            with self._client.use() as current:
                # Asking is a use: the master evicts what nobody has asked for the longest.
                self._client.answered(current.store.batch_is_exist([self._key(i) for i in ids]))

    def close(self) -> None:
        self._client.close()

    # epochs

    def epoch(self) -> Epoch:
        with self._client.use() as current:
            return self._epoch(current, self._lasts_s)

    def begin_epoch(self) -> Epoch:
        with self._client.use() as current:
            before = self._read_epoch(current)
            # Whatever stands here after this was begun after it, by us or by another clear.
            until = time.monotonic() + PATIENCE_S
            gone = (codes.OK, codes.NOT_FOUND)
            while self._removed(current.store, [self._epoch_key], force=True)[0] not in gone:
                if time.monotonic() > until:
                    raise TierUnavailable(f"{self._epoch_key} cannot be removed")
                time.sleep(PAUSE_S)
            return self._epoch(current, before.lasts_s if before else self._lasts_s)

    def forget(self, epoch: int) -> int:
        beginning = self._key(epoch_prefix(epoch)).replace(".", r"\.")
        with self._client.use() as current:
            # By force, for nobody uses them any more.
            removed = [current.store.remove_by_regex(f"^{beginning}", True)]
            (count,) = self._client.answered(removed)
        return max(0, count)

    # how

    @property
    def _epoch_key(self) -> str:
        return f"{self._prefix}/epoch"

    def _key(self, name: bytes) -> str:
        return f"{self._prefix}/{name.hex()}"

    def _end_what_was_given_up(self, current: Open, failed: bool, begun: float) -> None:
        if failed and time.monotonic() - begun > ABANDONED_S:
            # Only the end of the client is the end of its transfers, and of its hold on buffers.
            self._client.renew(current)

    def _epoch(self, current: Open, lasts_s: float) -> Epoch:
        """The present one, begun if there is none."""
        begun = time.monotonic()
        while True:
            found = self._read_epoch(current)
            if found is not None:
                return found
            epoch = new_epoch(lasts_s)
            line = [memoryview(encode_epoch(epoch))]
            kept = self._kept_for_good
            if self._put(current, self._epoch_key, line, kept, True, begun) is HIT:
                return epoch
            if time.monotonic() > begun + PATIENCE_S:
                raise TierUnavailable(f"{self._epoch_key} is neither to be read nor to be written")
            time.sleep(PAUSE_S)

    def _read_epoch(self, current: Open) -> Epoch | None:
        content = memoryview(bytearray(EPOCH_BUFFER_BYTES))
        (length,) = read(self._client, current, [self._epoch_key], [content])
        if _outcome(length) is MISS:
            return None
        if length < 0 and length != codes.INVALID:
            raise TierUnavailable(f"{self._epoch_key} cannot be read (code {length})")
        return decode_epoch(bytes(content[: max(0, length)]), self._epoch_key)

    def _sizes(self, store: Any, keys: Sequence[str]) -> list[int | Outcome]:
        """How large each object is; two questions for all of them."""
        there = self._client.answered(store.batch_is_exist(keys))
        asked = dict.fromkeys(key for key, one in zip(keys, there, strict=True) if one == 1)
        sizes: dict[str, int | Outcome] = {**sizes_of(store, list(asked))}
        if lost := [key for key in asked if key not in sizes]:
            # Gone since, or the master has: this question tells which.
            still = self._client.answered(store.batch_is_exist(lost))
            sizes |= {key: FAILED for key, one in zip(lost, still, strict=True) if one}
        return [
            FAILED if one < 0 else sizes.get(key, MISS)
            for key, one in zip(keys, there, strict=True)
        ]

    def _removed(self, store: Any, keys: list[str], force: bool) -> Sequence[int]:
        return self._client.answered(store.batch_remove(keys, force))

    def _remove(self, store: Any, keys: Sequence[str]) -> list[Outcome]:
        """Remove each; by force where readers leave no gap.

        The master keeps what was asked for lately from being removed, so that its memory is not
        another object's while somebody reads. A reader whom force surprises gets bytes that its
        checksum refuses.
        """
        outcomes, left = [FAILED] * len(keys), list(range(len(keys)))
        begun = time.monotonic()
        while left:
            waited = time.monotonic() - begun
            removed = self._removed(store, [keys[i] for i in left], waited > GENTLE_S)
            for i, code in zip(left, removed, strict=True):
                outcomes[i] = HIT if code == codes.OK else _outcome(code)
            left = [i for i, code in zip(left, removed, strict=True) if code in codes.HELD]
            if not left or waited > PATIENCE_S:
                break
            time.sleep(PAUSE_S)
        return outcomes

    def _put(
        self,
        current: Open,
        key: str,
        parts: Sequence[memoryview],
        kept: Any,
        careful: bool,
        begun: float,
    ) -> Outcome:
        """Store one object: room for it, its bytes, and only then is it there for others.

        Raises:
            TierFull: there is no room, and none was made.
        """
        views, store = [part for part in parts if len(part)], current.store
        with current.alone([f"put {key}"], begun + PATIENCE_S) as alone:
            if not alone:
                return FAILED
            try:
                with current.memory.lend(views) as loans:
                    code = self._make_room(store, key, sum(map(len, views)), kept, careful, begun)
                    if code == codes.EXISTS and careful:
                        return MISS
                    if code != codes.OK:
                        return FAILED
                    return self._fill(store, key, loans)
            except DeadlineExceeded:
                return FAILED

    def _make_room(
        self, store: Any, key: str, nbytes: int, kept: Any, careful: bool, begun: float
    ) -> int:
        """Begin to store an object, in the place of one that is there unless ``careful``."""
        first = time.monotonic()
        while True:
            started = store.batch_put_session_start([key], [nbytes], kept)
            (code,) = self._client.answered(started)
            now = time.monotonic()
            if code == codes.EXISTS and not careful:
                self._removed(store, [key], force=now - first > GENTLE_S)
            elif code == codes.NO_ROOM:
                if now - first > ROOM_S:
                    raise TierFull("Mooncake has no room, and evicts nothing")
            elif code == codes.INVALID:
                # A write of ours that lost the master before it could say that it failed.
                if store.batch_put_session_revoke([key]) != [codes.OK]:
                    return code
            else:
                return code
            if now > begun + PATIENCE_S:
                return code
            time.sleep(PAUSE_S)

    def _fill(self, store: Any, key: str, loans: Sequence[Loan]) -> Outcome:
        addresses, sizes, offsets = [], [], [0]
        for loan in loans:
            loan.take_in()
            addresses.append(loan.address)
            sizes.append(loan.nbytes)
            offsets.append(offsets[-1] + loan.nbytes)
        nbytes = offsets.pop()
        sent = store.batch_put_from_multi_buffer_ranges([key], [addresses], [sizes], [offsets])
        if sent != [nbytes]:
            self._client.answered(store.batch_put_session_revoke([key]))
            return FAILED
        ended = self._client.answered(store.batch_put_session_end([key]))
        return HIT if ended == [codes.OK] else FAILED


def _outcome(code: int) -> Outcome:
    """Of a code that is none of success."""
    return MISS if code in (codes.NOT_FOUND, codes.NOT_READY) else FAILED
