"""What a prefetch has found and not read yet: leases, so that the node brings it and keeps it.

SGLang asks what exists, and reads it some time later, in pieces, in part, or never. So a hold ends
when its last page has been read, when a read of it fails, by its age, or when there are too many.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstrata.observe.reasons import Reason
from kvstrata.wire.client import NodeClient, offsets_of

logger = logging.getLogger(__name__)

MAX_HOLDS = 64


@dataclass(eq=False)
class Hold:
    """A lease on the leading pages of a prompt, and how far they have been read.

    Args:
        client: whose lease it is.
        lease: its number.
        generation: of the weights that its pages were computed with.
        hashes: SGLang's, of the pages that are leased.
        keys: KVStrata's, of the same.
        parts: the objects of each page.
        offsets: of their slots, page by page; `kvstrata.wire.protocol.ARRIVING` and ``NEEDLESS``
            are none.
        tiers: a byte a page: where it was found.
        first: key of the prompt's first page, for the record.
        before: pages before these that SGLang had itself.
        asked: pages that SGLang asked for.
        why: of those that were not found.

    ``loaded`` are the numbers of the pages whose keys and values have been read, ``origins`` the
    engines that computed these, ``failed`` the number of the first that could not be.
    """

    client: NodeClient
    lease: int
    generation: str
    hashes: Sequence[str]
    keys: Sequence[bytes]
    parts: Sequence[int]
    offsets: list[int]
    tiers: bytes
    first: bytes
    before: int
    asked: int
    why: Sequence[Reason]
    began: float = field(default_factory=time.monotonic)
    load_s: float = 0.0
    loaded: set[int] = field(default_factory=set)
    origins: dict[int, str] = field(default_factory=dict)
    failed: int = -1
    unread: set[int] = field(default_factory=set)
    busy: bool = False
    until: float = 0.0

    def __post_init__(self) -> None:
        self.at = {page: i for i, page in enumerate(self.hashes)}
        self.unread = set(self.parts)

    def offset(self, number: int, part: int) -> int:
        """Where an object of a page is."""
        return self.offsets[number * len(self.parts) + self.parts.index(part)]

    def arrived(self, number: int, came: bytes) -> int:
        """Take in what has arrived from page ``number`` on; how many pages that is."""
        width, slots = len(self.parts), offsets_of(came).tolist()
        count = len(slots) // width
        self.offsets[number * width : (number + count) * width] = slots
        return count


class Holds:
    """The holds of one storage.

    Args:
        keep_s: how long one may be left alone.
        ended: told of each that ends, once.
    """

    def __init__(self, keep_s: float, ended: Callable[[Hold], None]) -> None:
        self._keep_s = keep_s
        self._ended = ended
        self._holds: list[Hold] = []  # the oldest first
        self._changed = threading.Condition()
        self._watch: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._holds)

    def add(self, hold: Hold) -> None:
        """Keep a lease for the reads to come; one of no pages ends at once."""
        hold.until = time.monotonic() + self._keep_s
        with self._changed:
            self._holds.append(hold)
            idle = [one for one in self._holds if not one.busy]
            over = idle[: max(0, len(self._holds) - MAX_HOLDS)]
            if not hold.hashes or (self._closed and not hold.busy):
                over = [hold]
            self._holds = [one for one in self._holds if one not in over]
            if self._watch is None and self._holds:
                self._watch = threading.Thread(
                    target=self._expire, name="kvstrata-holds", daemon=True
                )
                self._watch.start()
        for one in over:
            self._end(one)

    def take(self, page: str, part: int, generation: str) -> Hold | None:
        """The oldest hold with this object of a page, to be read; give it back with `leave`.

        SGLang reads in the order in which it has asked.
        """
        with self._changed:
            for hold in self._holds:
                fits = hold.generation == generation and hold.client.alive
                if fits and not hold.busy and page in hold.at and part in hold.parts:
                    hold.busy = True
                    return hold
        return None

    def leave(self, hold: Hold, *, done: bool) -> None:
        """A read of a hold has ended; ``done``: nothing more will be read of it."""
        hold.until = time.monotonic() + self._keep_s
        with self._changed:
            hold.busy = False
            done = (done or self._closed) and hold in self._holds
            if done:
                self._holds.remove(hold)
        if done:
            self._end(hold)

    def drop(self, client: NodeClient | None = None) -> None:
        """End those of a client, or all; not what is being read."""
        with self._changed:
            gone = [
                one
                for one in self._holds
                if not one.busy and (client is None or one.client is client)
            ]
            self._holds = [one for one in self._holds if one not in gone]
        for one in gone:
            self._end(one)

    def close(self) -> None:
        """End all, those to come too. Repeatable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.drop()

    def _expire(self) -> None:
        """End what nobody has come for; the thread ends with the last hold."""
        while True:
            with self._changed:
                now = time.monotonic()
                old = [one for one in self._holds if one.until <= now and not one.busy]
                self._holds = [one for one in self._holds if one not in old]
                if not self._holds:
                    self._watch = None
                left = min((one.until for one in self._holds), default=now) - now
            for one in old:
                self._end(one)
            with self._changed:
                if self._watch is not threading.current_thread() or self._closed:
                    return
                self._changed.wait(max(0.05, left))

    def _end(self, hold: Hold) -> None:
        hold.client.release(hold.lease)
        try:
            self._ended(hold)
        except Exception:
            # Whoever ends holds has others to end: a lease must not stay for a record's sake.
            logger.exception("KVStrata: the record of a prefetch died of a bug")
