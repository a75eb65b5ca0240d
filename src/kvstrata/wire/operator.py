"""What an operator asks of a node, as calls: the long ones answer with the number of a job."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from kvstrata.errors import DeadlineExceeded, UsageError
from kvstrata.header import NOBODY
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient

WATCH_S = 0.05
PAGE, PAGE_PINS = 500, 256
TIMEOUT_S = 30.0
"""For what a node may have to ask a store for, or to check."""


class Operator:
    """An operator's requests to one node. Thread-safe, as its client is.

    Each call raises what `kvstrata.wire.client.Call.wait` raises; `Busy` where as many jobs run as
    may, `UsageError` for what cannot be, by name.

    Args:
        client: of the node; stays the caller's.
        timeout_s: for each answer.
    """

    def __init__(self, client: NodeClient, timeout_s: float = TIMEOUT_S) -> None:
        self._client = client
        self._timeout_s = timeout_s

    def prefetch(
        self,
        keys: Sequence[bytes],
        parts: Sequence[int] = (),
        orders: Sequence[str] = (),
        lengths: Sequence[int] = (),
        namespace: bytes = b"",
        owner: bytes = NOBODY,
    ) -> int:
        """Have a prefix brought into host memory; the job.

        Args:
            keys: of its chunks, head first.
            parts: that make up a chunk; empty here and below: as the first chunk has it, where a
                tier of the node's own holds that.
            orders: byte orders that will do.
            lengths: payload bytes of each part.
            namespace: of the chunks; without it no shared tier is asked.
            owner: for whom.
        """
        fields = (list(parts), list(orders), list(lengths), namespace, owner)
        return self._job(o.Prefetch, b"".join(keys), *fields)

    def copy(
        self,
        keys: Sequence[bytes],
        source: str,
        target: str,
        parts: Sequence[int] = (),
        orders: Sequence[str] = (),
        namespace: bytes = b"",
        *,
        move: bool = False,
    ) -> int:
        """Have chunks copied from one tier to another; the job.

        Args:
            keys: of the chunks.
            source: a tier's name, "host" for host memory.
            target: likewise.
            parts: of each chunk, orders and namespace: needed where one of the tiers is shared.
            orders: see ``parts``.
            namespace: see ``parts``.
            move: remove each from ``source`` once it stands in ``target``.
        """
        fields = (b"".join(keys), source, target, list(parts), list(orders), namespace)
        return self._job(o.Move if move else o.Copy, *fields)

    def send(
        self,
        keys: Sequence[bytes],
        peer: str,
        parts: Sequence[int] = (),
        orders: Sequence[str] = (),
        lengths: Sequence[int] = (),
        namespace: bytes = b"",
    ) -> int:
        """Have another node, ``host:port``, fetch a prefix from this one; the job."""
        fields = (list(parts), list(orders), list(lengths), namespace)
        return self._job(o.Send, b"".join(keys), peer, *fields)

    def transcode(
        self,
        tier: str,
        codec: str = "",
        keys: Sequence[bytes] | None = None,
        parts: Sequence[int] = (),
        orders: Sequence[str] = (),
        namespace: bytes = b"",
    ) -> int:
        """Have chunks of a tier stored again with another codec; the job.

        Args:
            tier: its name.
            codec: the codec's; empty: the tier's own.
            keys: of the chunks; None: all that a tier of the node's own holds.
            parts: as of `copy`, and so are the others.
            orders: see ``parts``.
            namespace: see ``parts``.
        """
        packed = None if keys is None else b"".join(keys)
        return self._job(o.Transcode, tier, codec, packed, list(parts), list(orders), namespace)

    def scrub(self, tier: str) -> int:
        """Have all that a tier holds verified now; the job."""
        return self._job(o.Scrub, tier)

    def drain(self, *, end: bool = False) -> int:
        """Have the node take no more stores, and ``end`` once all is written; the job."""
        return self._job(o.Drain, end)

    def undrain(self) -> bool:
        """Let the node take stores again; whether it did not."""
        done: p.Done = self._ask(o.Undrain, p.Done)
        return bool(done.count)

    def inspect(
        self,
        tier: str,
        key: bytes,
        part: int = 0,
        orders: Sequence[str] = (),
        namespace: bytes = b"",
    ) -> o.Inspected:
        """One object's header, verified; ``problem`` is empty where it is whole."""
        found: o.Inspected = self._ask(
            o.Inspect, o.Inspected, tier, key, part, list(orders), namespace
        )
        return found

    def chunks(self, tier: str = "", page: int = PAGE) -> Iterator[o.Chunk]:
        """All chunks of a tier, or of all tiers of the node's own, in the order of their keys."""
        after = b""
        while True:
            listed: o.Listed = self._ask(o.List, o.Listed, tier, after, page)
            yield from listed.chunks
            after = listed.next
            if not after:
                return

    def reload(self, config: dict[str, Any]) -> o.Reloaded:
        """Hold the node to another configuration, whole, as `Config.to_dict` has it.

        Raises:
            KVStrataError: it is none, or changes what needs a restart; nothing has changed then.
        """
        reloaded: o.Reloaded = self._ask(o.Reload, o.Reloaded, config)
        return reloaded

    def jobs(self, page: int = PAGE) -> Iterator[o.JobState]:
        """The jobs that run and the last that ended, the oldest first."""
        after = 0
        while True:
            some: o.JobPage = self._ask(o.Jobs, o.JobPage, after, page)
            yield from some.jobs
            after = some.next
            if not after:
                return

    def job(self, number: int) -> o.JobState:
        """One job. Raises `UsageError` where there is none of that number any more."""
        some: o.JobPage = self._ask(o.Jobs, o.JobPage, number - 1, 1)
        if not some.jobs or some.jobs[0].id != number:
            raise UsageError(f"there is no job {number}, or it ended too long ago")
        return some.jobs[0]

    def cancel(self, number: int) -> bool:
        """Ask a job to end; whether it was running."""
        done: p.Done = self._ask(o.Cancel, p.Done, number)
        return bool(done.count)

    def wait(self, number: int, timeout_s: float) -> o.JobState:
        """Wait until a job has ended.

        Raises:
            DeadlineExceeded: it has not, and goes on.
        """
        deadline = time.monotonic() + timeout_s
        while (state := self.job(number)).state == "running":
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"job {number} has not ended within {timeout_s:g} s")
            time.sleep(WATCH_S)
        return state

    def pin(self, keys: Sequence[bytes], owner: bytes, name: str, ttl_s: float) -> p.Pinned:
        """Keep chunks in the node's own tiers, now and where they come later.

        Repeating it renews it; a pin of the same owner and name takes the place of the earlier.

        Args:
            keys: of the chunks, head first: where the quota ends, the tail is not kept.
            owner: on whose quota, 16 bytes; see `kvstrata.keys.owner_digest`.
            name: what to unpin it by, 1 to 128 characters.
            ttl_s: for how long, in seconds.
        Returns:
            How many of the chunks are kept, in which tiers, and which tiers do not keep any.
        """
        pinned: p.Pinned = self._ask(p.Pin, p.Pinned, b"".join(keys), owner, name, ttl_s)
        return pinned

    def unpin(self, owner: bytes, name: str) -> int:
        """End a pin; how many chunks it had, 0 where there is none."""
        done: p.Done = self._ask(p.Unpin, p.Done, owner, name)
        return done.count

    def pins(self) -> Iterator[p.PinState]:
        """All pins, page by page, by owner and name."""
        after = b""
        while True:
            page: p.PinPage = self._ask(p.Pins, p.PinPage, after, PAGE_PINS)
            yield from page.pins
            after = page.after
            if not after:
                return

    def quota(self, owner: bytes, tier: str, nbytes: int | None) -> int:
        """Let an owner have so many bytes in one of the node's own tiers; None: no bound.

        What is too much goes at once, as far as nobody holds it.

        Returns:
            What the owner has there now, in bytes.
        """
        done: p.Done = self._ask(p.Quota, p.Done, owner, tier, nbytes)
        return done.count

    def clear(
        self,
        *,
        keys: Sequence[bytes] | None = None,
        tiers: Sequence[str] = (),
        owner: bytes = b"",
        namespace: bytes = b"",
        before_ns: int = 0,
    ) -> int:
        """Forget all that fits every one of these; how many objects have gone that were known.

        Args:
            keys: of chunks, as many as a request may have; None: of any.
            tiers: where; empty: everywhere.
            owner: whose, 16 bytes; empty: anybody's.
            namespace: of which, 32 bytes; empty: of any.
            before_ns: stored before that time, nanoseconds since 1970; 0: until now.
        """
        packed = None if keys is None else b"".join(keys)
        fields = (packed, list(tiers), owner, namespace, before_ns)
        done: p.Done = self._ask(p.Clear, p.Done, *fields)
        return done.count

    def _job(self, message: type, *fields: Any) -> int:
        started: o.Started = self._ask(message, o.Started, *fields)
        return started.job

    def _ask(self, message: type, reply: type, *fields: Any) -> Any:
        return self._client.begin(message, reply, *fields).wait(self._timeout_s)
