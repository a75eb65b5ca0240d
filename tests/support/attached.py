"""A client of a node of a deployment, for tests: it stores chunks, loads them, and compares."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.nodes import NAMESPACE, ORDER, RAW, payload, template

from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

SECRET = bytes(range(32))


def secret_in(folder: Path) -> Path:
    """The deployment's secret, as a file."""
    secret = folder / "secret"
    if not secret.exists():
        secret.write_bytes(SECRET)
        secret.chmod(0o600)
    return secret


class Attached:
    """What an engine does with a node, in small.

    Args:
        client: of the node.
        nbytes: of a chunk's payload.
    """

    def __init__(self, client: NodeClient, nbytes: int = RAW) -> None:
        self.client = client
        self.nbytes = nbytes

    def store(self, keys: Sequence[bytes], order: str = ORDER, **more: Any) -> None:
        call = self.client.reserve(NAMESPACE, keys, 0, 0, template(order, self.nbytes), **more)
        reserved = call.wait(5.0)
        sums = []
        for key, offset in zip(keys, offsets_of(reserved.offsets), strict=True):
            data = payload(key, nbytes=self.nbytes)
            if offset >= 0:  # or it is there already
                self.client.pool.view(offset + HEADER_BYTES, self.nbytes)[:] = data
            sums.append(checksum(data))
        self.client.commit(reserved.reservation, sums).wait(5.0)

    def match(self, keys: Sequence[bytes], namespace: bytes = NAMESPACE, **more: Any) -> p.Matched:
        """What the node answers; the lease is the caller's."""
        call = self.client.match(keys, [0], [ORDER], [self.nbytes], namespace=namespace, **more)
        matched: p.Matched = call.wait(5.0)
        return matched

    def get(self, keys: Sequence[bytes], namespace: bytes = NAMESPACE, **more: Any) -> list[int]:
        """Match, load, compare; the tier of each chunk that came."""
        matched, ready, offsets = self.match(keys, namespace, **more), 0, [-1] * len(keys)
        while ready < len(matched.tiers):
            if -1 not in offsets[: len(matched.tiers)]:
                break
            arrived = self.client.await_arrival(matched.lease, ready).wait(20.0)
            offsets[ready : arrived.ready] = offsets_of(arrived.offsets)
            ready = arrived.ready
            if arrived.failed:
                break
        for key, offset in zip(keys, offsets[:ready], strict=False):
            found = bytes(self.client.pool.view(offset + HEADER_BYTES, self.nbytes))
            assert found == payload(key, nbytes=self.nbytes)
        self.client.release(matched.lease)
        return list(matched.tiers[:ready])

    def counted(self, name: str) -> float:
        counters = self.client.status()["counters"]
        return float(sum(count for one, count in counters.items() if one.startswith(name)))

    def state(self) -> str:
        tiers = self.client.status()["tiers"]
        return str(next(tier["state"] for tier in tiers if tier["name"] == "peer"))

    def until(self, true: Callable[[], bool], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.01)

    def heard(self, timeout_s: float = 10.0) -> None:
        """Wait until it has heard of a peer."""
        self.until(lambda: self.state() == "ok", timeout_s)
