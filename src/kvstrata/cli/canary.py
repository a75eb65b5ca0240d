"""Canaries that go the way of real chunks through a node, tier by tier, and are compared.

They are forgotten at the end. Each step answers with what it measured, or with the problem that it
met.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles

import numpy as np

from kvstrata.canaries import CHUNK_TOKENS, ORDER, PART, Canaries
from kvstrata.errors import DeadlineExceeded, NodeUnavailable, TierUnavailable
from kvstrata.objects import HEADER_BYTES, checksum, stored_bytes
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

ABSENT = p.ABSENT
FIRST_WRITE_S = 60.0
"""For which writing behind is waited for at least. With the first object a node compiles its codec
or measures it, in threads that yield to all others, and gives that a minute."""

REFUSALS = {
    p.PRESENT: "they are said to be there already",
    p.BUSY: "somebody else is said to be writing them",
    p.FULL: "there is no room: everything in host memory is leased",
    p.DRAINING: "the node is being drained, and takes no stores",
    p.REFUSED: "they are more than one client may reserve (leases.per_client)",
}


@dataclass
class Step:
    """What a step came to: seconds by what took them, and a problem in words, empty if none."""

    seconds: dict[str, float] = field(default_factory=dict)
    problem: str = ""


class Canary:
    """The chunks, and the steps of their way.

    Args:
        client: of the node to try; stays the caller's.
        num_chunks: how many.
        payload_bytes: bytes of each chunk's payload.
        timeout_s: how long one message, or one load, may take.
    """

    def __init__(
        self, client: NodeClient, num_chunks: int, payload_bytes: int, timeout_s: float
    ) -> None:
        self.num_chunks = num_chunks
        self.payload_bytes = payload_bytes
        self._client = client
        self._timeout_s = timeout_s
        self._stored_at = 0.0
        self._chunks = Canaries(client.hello.secret, num_chunks, payload_bytes)
        self._payloads, self._namespace = self._chunks.payloads, self._chunks.namespace
        self._copies = np.ones_like(self._payloads)  # written, so that no copy pays for pages
        self.keys = self._chunks.keys

    @property
    def nbytes(self) -> int:
        """Payload bytes of all chunks."""
        return self.num_chunks * self.payload_bytes

    def store(self) -> Step:
        """Reserve, write and commit all chunks. Measures ``copy`` (with checksums)."""
        template = p.Template(
            kind="portable",
            order="",
            dtype="uint8",
            shape=[self.payload_bytes],
            num_tokens=CHUNK_TOKENS,
            raw_length=self.payload_bytes,
        )
        reserving = self._client.reserve(self._namespace, self.keys, 0, PART, template)
        reserved: p.Reserved = reserving.wait(self._timeout_s)
        offsets = offsets_of(reserved.offsets)
        begun = time.perf_counter()
        sums = [
            self._write(offset, payload) if offset >= 0 else bytes(16)
            for offset, payload in zip(offsets, self._payloads, strict=True)
        ]
        copied = time.perf_counter() - begun
        self._stored_at = time.perf_counter()
        done: p.Done = self._client.commit(reserved.reservation, sums).wait(self._timeout_s)
        refused = [offset for offset in offsets if offset < 0]
        if refused:
            why = REFUSALS.get(refused[0], f"the node answered {refused[0]}")
            return Step(problem=f"{len(refused)} of {self.num_chunks} chunks got no room: {why}")
        if done.count != self.num_chunks:
            return Step(problem=f"only {done.count} of {self.num_chunks} chunks were published")
        return Step({"copy": copied})

    def read_back(self) -> Step:
        """Match, wait for arrival, copy out, compare. Measures ``arrive`` and ``copy``."""
        begun = time.perf_counter()
        deadline = time.monotonic() + self._timeout_s
        matched: p.Matched = self._client.match(
            self.keys, [PART], [ORDER], [self.payload_bytes], namespace=self._namespace
        ).wait(self._timeout_s)
        try:
            found, ready, failed = len(matched.tiers), 0, False
            offsets = list(offsets_of(matched.offsets))
            while ready < found and not failed:
                left = max(0.001, deadline - time.monotonic())
                try:
                    arrived: p.Arrived = self._client.await_arrival(matched.lease, ready).wait(left)
                except DeadlineExceeded as error:
                    return Step(
                        problem=f"{ready} of {self.num_chunks} chunks came back, then {error}"
                    )
                offsets[ready : arrived.ready] = offsets_of(arrived.offsets)
                ready, failed = arrived.ready, arrived.failed
            arrive = time.perf_counter() - begun
            for offset, copy in zip(offsets[:ready], self._copies, strict=False):
                copy[:] = self._client.pool.array(offset + HEADER_BYTES, self.payload_bytes)
            seconds = {"arrive": arrive, "copy": time.perf_counter() - begun - arrive}
            wrong = [i for i in range(ready) if not self._is_right(i, offsets[i])]
        finally:
            self._client.release(matched.lease)
        if wrong:
            return Step(problem=f"{len(wrong)} of {ready} chunks came back with OTHER bytes")
        if ready < self.num_chunks:
            return Step(problem=f"only {ready} of {self.num_chunks} chunks came back")
        return Step(seconds)

    def where(self) -> list[int]:
        """The number of each chunk's tier: 0 host, 1 and up the slower ones, 255 none."""
        return list(self._client.lookup(self.keys, [PART], [ORDER], self._namespace))

    def round_trip(self, repeats: int = 200) -> Step:
        """Measures ``median`` and ``p99`` of a lookup of all chunks."""
        taken = []
        for _ in range(repeats):
            begun = time.perf_counter()
            self._client.lookup(self.keys, [PART])
            taken.append(time.perf_counter() - begun)
        cuts = quantiles(taken, n=100)
        return Step({"median": cuts[49], "p99": cuts[98]})

    def write_behind(self) -> Step:
        """Wait until it is written. Measures ``flush``, from the commit of `store` on."""
        try:
            self._client.flush(max(self._timeout_s, FIRST_WRITE_S))
        except DeadlineExceeded as error:
            return Step(problem=str(error))
        return Step({"flush": time.perf_counter() - self._stored_at})

    def drop(self, tiers: Sequence[str]) -> int:
        """Forget the chunks in these tiers, in all if none is named; returns how many objects."""
        return self._client.clear(self.keys, tiers, self._timeout_s)

    def close(self) -> None:
        """Forget the chunks everywhere, as far as that can be done; never raises."""
        with contextlib.suppress(NodeUnavailable, DeadlineExceeded, TierUnavailable):
            self.drop([])

    def _write(self, offset: int, payload: np.ndarray) -> bytes:
        self._client.pool.array(offset + HEADER_BYTES, self.payload_bytes)[:] = payload
        return checksum(payload.data)

    def _is_right(self, number: int, offset: int) -> bool:
        view = self._client.pool.view(offset, stored_bytes(self.payload_bytes))
        if not self._chunks.is_right(number, view):
            return False
        return np.array_equal(self._copies[number], self._payloads[number])
