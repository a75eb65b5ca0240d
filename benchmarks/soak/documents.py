"""Prompts of a tenant, what their chunks hold, and what of it was cleared."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Sequence

import numpy as np
from benchmarks.common import expect
from blake3 import blake3

from kvstrata.keys import KeyChain, Namespace, owner_digest

CHUNK = 128
NBYTES = 32 << 10
NUM_DOCUMENTS, MOST_CHUNKS = 400, 24
STAMP_BYTES = 8


def tokens_of(seed: int) -> list[list[int]]:
    """Random prompts of whole chunks."""
    rng = np.random.default_rng(seed)
    return [
        rng.integers(128_000, size=CHUNK * int(rng.integers(1, MOST_CHUNKS + 1))).tolist()
        for _ in range(NUM_DOCUMENTS)
    ]


class Documents:
    """One tenant's prompts, which have the tokens of every other tenant's, and its chunks' keys.

    Args:
        secret: of the node.
        tokens: of the prompts.
        tenant: whose they are.
    """

    def __init__(self, secret: bytes, tokens: list[list[int]], tenant: str) -> None:
        self.space = Namespace("fingerprint", "layout", CHUNK, tenant=tenant)
        self.owner = owner_digest(secret, tenant, "")
        self.tokens = tokens
        chain = KeyChain(secret, self.space.digest(), CHUNK)
        self.keys = [chain.keys(one) for one in tokens]
        self._lock = threading.Lock()
        self._floors: dict[bytes, int] = {}

    @property
    def digest(self) -> str:
        """The namespace's, as the API takes it."""
        return self.space.digest().hex()

    def pick(self, rng: random.Random) -> int:
        """Some more often than others."""
        return min(int(rng.paretovariate(0.6)) - 1, NUM_DOCUMENTS - 1)

    def cleared(self, keys: Iterable[bytes], begun_ns: int) -> None:
        """A clear of these has been answered: what was reserved before it began is gone."""
        with self._lock:
            for key in keys:
                self._floors[key] = max(begun_ns, self._floors.get(key, 0))

    def all_cleared(self, begun_ns: int) -> None:
        """The same of all that the tenant has."""
        for keys in self.keys:
            self.cleared(keys, begun_ns)

    def floors(self, keys: Sequence[bytes]) -> list[int]:
        """When the last clear of each began that has been answered by now."""
        return [self._floors.get(key, 0) for key in keys]


def payload(key: bytes, stamp_ns: int) -> bytes:
    """What a chunk holds: when it was reserved, then noise that its key decides.

    The high byte of each value has 3 bits of it, about as KV in bfloat16 does.
    """
    noise = np.frombuffer(blake3(key).digest(NBYTES), np.uint8).copy()
    noise[1::2] = (noise[1::2] & 7) | 0x38
    noise[:STAMP_BYTES] = np.frombuffer(stamp_ns.to_bytes(STAMP_BYTES, "little"), np.uint8)
    return bytes(noise)


def stamp_of(found: bytes, key: bytes) -> int:
    """When what came back was reserved; raises `Wrong` where it is not what the key decides."""
    stamp = int.from_bytes(found[:STAMP_BYTES], "little")
    expect(found == payload(key, stamp), f"{key.hex()} holds something else")
    return stamp
