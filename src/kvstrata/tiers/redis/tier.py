"""Objects in Redis or Valkey: one value each, or several where one would be too large.

``docs/redis.md`` says how they lie there. A value begins with a line (`heads`) that has the
object's version, so a deletion means the object that was seen and no other.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.base import Epoch, Limits, Outcome, Put, SharedTier, Stat
from kvstrata.tiers.epochs import decode_epoch, encode_epoch, epoch_prefix, marked, new_epoch
from kvstrata.tiers.marks import Mark
from kvstrata.tiers.redis.address import Address
from kvstrata.tiers.redis.client import Client
from kvstrata.tiers.redis.connections import Buffers
from kvstrata.tiers.redis.heads import (
    HEAD_BYTES,
    MAGIC,
    Head,
    beginning,
    decode_head,
    new_head,
)

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
PIECE_BYTES = (4 << 20) - 4096
"""Redis copies a value whole to answer with it, and serves nobody else meanwhile: 0.2 ms for this
much, but 15 ms for 16 MiB, since its allocator gets memory anew for what is that large. With its
line a piece is no more than 4 MiB, of which sizes the allocator has one."""
FORGET_BATCH = 500
ATTEMPTS = 3
"""To read an object that others replace meanwhile."""

_VERSION = re.compile("[0-9a-f]{16}")

# Removes what begins with ARGV[1], whatever it is now where that is empty; answers with its line.
_REMOVE = f"""
local head = redis.call('GETRANGE', KEYS[1], 0, {HEAD_BYTES - 1})
if head == '' or string.sub(head, 1, #ARGV[1]) ~= ARGV[1] then return false end
redis.call('UNLINK', KEYS[1])
return head
"""


# Puts ARGV[2] in the place of ARGV[1].
_EXCHANGE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


class RedisTier(SharedTier):
    """A tier in a Redis server or a cluster; nothing is asked of it before the first call.

    Args:
        address: where it is.
        prefix: what all keys begin with.
        lasts_s: of an epoch, if this is the one to begin the first.
        ttl_s: how long an object stays that nobody uses; 0: until it is evicted.
        timeout_s: within which every call ends.
        piece_bytes: an object that is larger is cut into several values.
    """

    name = "redis"

    def __init__(
        self,
        address: Address,
        prefix: str = "kvstrata",
        *,
        lasts_s: float = 5.0,
        ttl_s: float = 0.0,
        timeout_s: float = TIMEOUT_S,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.limits = Limits(batch_objects=256, batch_bytes=1 << 30, timeout_s=timeout_s)
        self._client = Client(address, self.limits.concurrency, timeout_s)
        self._prefix = prefix.encode() + b":"
        self._epoch_key = self._prefix + b"epoch"
        self._where = f"the key {self._epoch_key.decode()} of redis"
        self._lasts_s = lasts_s
        self._expiry = ("PX", max(1, round(1000 * ttl_s))) if ttl_s else ()
        self._piece_bytes = piece_bytes
        self._forgetting: dict[int, Iterator[bytes]] = {}

    # objects

    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        with self._client.call():
            return [_stat(line) for line in self._lines([self._key(one) for one in ids])]

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        with self._client.call():
            return [
                self._read(self._key(one), buffer) for one, buffer in zip(ids, into, strict=True)
            ]

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        with self._client.call(), self._client.changing():
            return [self._write(put) for put in puts]

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        if versions is None:
            versions = [""] * len(ids)
        keys = [self._key(one) for one in ids]
        wanted = [_beginning(version) for version in versions]
        with self._client.call(), self._client.changing():
            answers = iter(
                self._client.batch(
                    [
                        ("EVAL", _REMOVE, 1, key, start)
                        for key, start in zip(keys, wanted, strict=True)
                        if start is not None
                    ]
                )
            )
            lines = [None if start is None else next(answers) for start in wanted]
            self._unlink(_later(keys, lines))
        return [line if isinstance(line, Outcome) else _hit(line is not None) for line in lines]

    def touch(self, ids: Sequence[bytes]) -> None:
        with self._client.call(), self._client.changing():
            keys = [self._key(one) for one in ids]
            # Their lines are used by being looked at; what there is to renew is another matter.
            rest = _later(keys, self._lines(keys))
            if self._expiry:
                self._client.batch([("PEXPIRE", key, self._expiry[1]) for key in [*keys, *rest]])
            else:
                self._client.batch([("TOUCH", key) for key in rest])

    def close(self) -> None:
        self._client.close()

    def _read(self, key: bytes, buffer: memoryview) -> int | Outcome:
        for _ in range(ATTEMPTS):
            line = memoryview(bytearray(HEAD_BYTES))
            length = self._fetch(key, Buffers([line, buffer]))
            if length is None or isinstance(length, Outcome):
                return length or Outcome.MISS
            seen = bytes(line[: min(length, HEAD_BYTES)])
            head = decode_head(seen)
            if length > HEAD_BYTES + len(buffer) or (head and head.nbytes > len(buffer)):
                return Outcome.FAILED
            if head is not None and self._fetch_all(key, head, length - HEAD_BYTES, buffer):
                return head.nbytes
            if seen.startswith(MAGIC) and not seen.startswith(beginning("")):
                return Outcome.FAILED  # of a later release, which wants to find it again
            if self._remove(key, seen):
                logger.warning("redis: %s was not whole, and is removed", key.decode())
                return Outcome.MISS
        return Outcome.MISS

    def _fetch_all(self, key: bytes, head: Head, first: int, buffer: memoryview) -> bool:
        """Read the pieces behind the first one; whether each is there and as long as it must be."""
        (start, end), *others = head.bounds
        if first != end - start:
            return False
        return all(
            self._fetch(piece, Buffers([buffer[start:end]])) == end - start
            for piece, (start, end) in zip(head.later(key), others, strict=True)
        )

    def _fetch(self, key: bytes, into: Buffers) -> int | Outcome | None:
        command = ("GETEX", key, *self._expiry) if self._expiry else ("GET", key)
        length: int | Outcome | None = self._client.run(*command, into=into)
        return length

    def _write(self, put: Put) -> Outcome:
        key, head = self._key(put.object_id), new_head(put.nbytes, self._piece_bytes)
        first, *others = (_cut(put, start, end) for start, end in head.bounds)
        later = head.later(key)
        if put.if_absent and later and self._lines([key]) != [b""]:
            return Outcome.MISS  # the pieces would be sent for nothing
        stands = False
        try:
            for piece, value in zip(later, others, strict=True):
                self._client.run("SET", piece, value, *self._expiry)
            # Last what makes the object be there.
            value = Buffers([memoryview(head.encode()), *first])
            stands = self._put(key, head, value, put.if_absent)
        finally:
            if not stands:
                with self._client.quietly():
                    self._unlink(later)
        return _hit(stands)

    def _put(self, key: bytes, head: Head, value: Buffers, if_absent: bool) -> bool:
        if not if_absent:
            look = ("GETRANGE", key, 0, HEAD_BYTES - 1)
            before, done = self._client.together([look, ("SET", key, value, *self._expiry)])
            with self._client.quietly():
                self._unlink(_later([key], [before]))
            return bool(done)
        if self._client.run("SET", key, value, "NX", *self._expiry):
            return True
        # It may have been ours, of a first attempt whose answer was lost.
        (line,) = self._lines([key])
        return isinstance(line, bytes) and line == head.encode()

    def _remove(self, key: bytes, seen: bytes) -> bool:
        line = self._client.run("EVAL", _REMOVE, 1, key, seen)
        self._unlink(_later([key], [line]))
        return isinstance(line, bytes)

    def _lines(self, keys: Sequence[bytes]) -> list[bytes | Outcome]:
        return self._client.batch([("GETRANGE", key, 0, HEAD_BYTES - 1) for key in keys])

    def _unlink(self, keys: Sequence[bytes]) -> int:
        return sum(answer == 1 for answer in self._client.batch([("UNLINK", one) for one in keys]))

    def _key(self, name: bytes) -> bytes:
        return self._prefix + name.hex().encode()

    # epochs

    def epoch(self) -> Epoch:
        with self._client.call():
            return self._epoch()

    def begin_epoch(self) -> Epoch:
        with self._client.call():
            content = encode_epoch(new_epoch(self._epoch().lasts_s))
            with self._client.changing():
                self._client.run("SET", self._epoch_key, content)
            return decode_epoch(content, self._where)

    def add_mark(self, mark: Mark) -> Epoch:
        with self._client.call() as time:
            while time.left_s > 0:
                before = self._epoch()
                after = marked(before, mark)
                old, new = encode_epoch(before), encode_epoch(after)
                with self._client.changing():
                    done = self._client.run("EVAL", _EXCHANGE, 1, self._epoch_key, old, new)
                if done == 1:
                    return after
            raise TierUnavailable(f"{self._where} is changed by others all the time")

    def _epoch(self) -> Epoch:
        content = self._client.run("GET", self._epoch_key)
        if content is None:
            first = encode_epoch(new_epoch(self._lasts_s))
            with self._client.changing():
                self._client.run("SET", self._epoch_key, first, "NX")
            content = self._client.run("GET", self._epoch_key)
        if content is None:
            raise TierUnavailable(f"{self._where} does not stay; is there room for it?")
        return decode_epoch(content, self._where)

    def forget(self, epoch: int) -> int:
        """See `SharedTier.forget`. What there is no time for is done by `upkeep`."""
        with self._client.call() as time, self._client.changing():
            pattern = self._prefix + epoch_prefix(epoch).hex().encode() + b"*"
            keys = self._forgetting.pop(epoch, None) or self._client.keys(pattern)
            count = 0
            while batch := list(itertools.islice(keys, FORGET_BATCH)):
                self._unlink([key for key in batch if self._is_piece(key)])
                count += self._unlink([key for key in batch if not self._is_piece(key)])
                if time.left_s < self.limits.timeout_s / 2:
                    self._forgetting[epoch] = keys
                    break
            return count

    def upkeep(self) -> None:
        for epoch in list(self._forgetting):
            self.forget(epoch)

    def _is_piece(self, key: bytes) -> bool:
        return b":" in key[len(self._prefix) :]


def _stat(line: bytes | Outcome) -> Stat | Outcome:
    if isinstance(line, Outcome):
        return line
    if not line:
        return Outcome.MISS
    head = decode_head(line)
    return Outcome.FAILED if head is None else Stat(head.nbytes, "", head.version)


def _hit(done: bool) -> Outcome:
    return Outcome.HIT if done else Outcome.MISS


def _beginning(version: str) -> bytes | None:
    """What the line of such an object begins with; None: no object has such a version."""
    if not version:
        return b""
    return beginning(version) if _VERSION.fullmatch(version) else None


def _later(keys: Sequence[bytes], lines: Sequence[object]) -> list[bytes]:
    """The keys of the pieces behind the first ones of objects, by their lines."""
    heads = [decode_head(line) if isinstance(line, bytes) else None for line in lines]
    return [
        piece for key, head in zip(keys, heads, strict=True) if head for piece in head.later(key)
    ]


def _cut(put: Put, start: int, end: int) -> Buffers:
    """A part of an object, wherever it lies."""
    border = len(put.header_page)
    parts = [
        put.header_page[start:end],
        put.payload[max(0, start - border) : max(0, end - border)],
    ]
    return Buffers(part for part in parts if len(part))
