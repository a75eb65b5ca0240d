"""When objects were used last: a store does not know, so each node leaves a note now and then.

A note names what a node has used since its last one, what was used first at first. The time of the
uses is when the store says the note was written, so nodes need not agree on a time. Whoever
sweeps reads the notes of a day, and removes those that are older.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kvstrata.errors import CorruptObject
from kvstrata.tiers.base import MAX_NAME_BYTES
from kvstrata.tiers.object_store.client import ObjectClient, Turn
from kvstrata.tiers.object_store.paths import USES

NOTE_EVERY_S = 600.0
MAX_NOTED = 1 << 14
"""Names of one note; a node that uses more writes one sooner."""
KEEP_S = 86400.0
MAX_REMEMBERED = 1 << 19
"""Names whose last use the sweeping node knows; of more, those used first count as unused."""

_MAGIC = b"kvstrata-uses 1\n"


def encode_note(names: Sequence[bytes]) -> bytes:
    """Each name with its length in a byte before it."""
    return _MAGIC + b"".join(bytes([len(name)]) + name for name in names)


def decode_note(content: bytes) -> list[bytes]:
    """The inverse.

    Raises:
        CorruptObject: that is no note.
    """
    if not content.startswith(_MAGIC):
        raise CorruptObject(f"no note of uses: {content[:32]!r}")
    names, at = [], len(_MAGIC)
    while at < len(content):
        length = content[at]
        name = content[at + 1 : at + 1 + length]
        if not 0 < length <= MAX_NAME_BYTES or len(name) != length:
            raise CorruptObject(f"a note of uses is damaged at byte {at}")
        names.append(name)
        at += 1 + length
    return names


class Notes:
    """What this node has used; thread-safe.

    Args:
        client: of the store.
        every_s: how often a note is written, if anything was used.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: ObjectClient,
        every_s: float = NOTE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._every_s = every_s
        self._clock = clock
        self._due = clock() + every_s
        self._lock = threading.Lock()
        self._names: dict[bytes, None] = {}
        node = secrets.token_hex(8)
        self._paths = (f"{USES}/{node}-{n:08x}" for n in itertools.count())

    def note(self, names: Sequence[bytes]) -> None:
        """These were used just now, in this order; of too many, those used first are forgotten."""
        with self._lock:
            for name in names:
                self._names.pop(name, None)
                self._names[name] = None
            while len(self._names) > 2 * MAX_NOTED:
                del self._names[next(iter(self._names))]

    def write(self, turn: Turn) -> None:
        """Leave a note, if it is due.

        Raises:
            TierUnavailable: it could not be written; it is lost.
        """
        with self._lock:
            if not self._names:
                return
            if self._clock() < self._due and len(self._names) < MAX_NOTED:
                return
            names = list(self._names)[-MAX_NOTED:]
            self._names.clear()
            self._due = self._clock() + self._every_s
        self._client.put(next(self._paths), [encode_note(names)], turn)


class LastUses:
    """What all nodes have used, as their notes say: kept by whoever sweeps."""

    def __init__(self, client: ObjectClient, keep_s: float = KEEP_S) -> None:
        self._client = client
        self._keep_s = keep_s
        self._read: set[str] = set()
        self._last: dict[bytes, float] = {}

    def of(self, name: bytes) -> float:
        """When it was used last, by the store's clock in Unix seconds; 0: nobody says."""
        return self._last.get(name, 0.0)

    def gather(self, now_s: float, turn: Callable[[], Turn]) -> Iterator[None]:
        """Read the notes that are new, and remove those that are old, a request for each step.

        Args:
            now_s: the store's time, Unix seconds.
            turn: in whose turn the next request is made.
        """
        oldest, there = now_s - self._keep_s, set()
        for batch in self._client.listing(USES):
            yield
            for found in batch:
                there.add(found.path)
                if found.written_s < oldest:
                    self._client.delete(found.path, turn())
                    yield
                elif found.path not in self._read:
                    content = self._client.small(found.path, turn())
                    self._learn(b"" if content is None else content[0], found.written_s)
                    self._read.add(found.path)
                    yield
        self._read &= there
        self._last = {name: used for name, used in self._last.items() if used >= oldest}

    def _learn(self, content: bytes, written_s: float) -> None:
        try:
            names = decode_note(content)
        except CorruptObject:
            return  # nobody can use it, and it goes when it is old
        for place, name in enumerate(names):
            # The places keep the order of a note: a prompt's tail goes before its head.
            used = written_s + place * 1e-6
            self._last[name] = max(used, self.of(name))
        if len(self._last) > MAX_REMEMBERED:
            newest = sorted(self._last.items(), key=lambda item: item[1])[-MAX_REMEMBERED // 2 :]
            self._last = dict(newest)
