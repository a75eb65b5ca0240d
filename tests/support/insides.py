"""An engine that stores whole chunks and tails with their marks, and asks what is inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.support.nodes import ORDER, arrive, at_once, payload, stored_payload

from kvstrata.keys import KeyChain, Namespace, owner_digest
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

SECRET, CHUNK, BLOCK = bytes(32), 64, 16
BLOCK_BYTES = 5000 // 4
PER_CHUNK = CHUNK // BLOCK


class Engine:
    """What an engine does with a node, of prompts that it has the tokens of."""

    def __init__(self, node: Node, tenant: str = "a", salt: str = "") -> None:
        self.node, self.client = node, Client("pid 1")
        self.namespace = Namespace("m", "l", CHUNK, tenant=tenant).digest()
        self.chain = KeyChain(SECRET, self.namespace, CHUNK, salt)
        self.owner = owner_digest(SECRET, tenant, salt)

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Of the whole chunks, and of the tail."""
        keys = self.chain.keys(tokens)
        start = len(keys) * CHUNK
        if start < len(tokens):
            parent = keys[-1] if keys else None
            keys.append(self.chain.tail(tokens[start:], (), start, parent))
        return keys

    def store(
        self, tokens: Sequence[int], order: str = ORDER, marked: bool = True, cost: float = 0.0
    ) -> int:
        """Whole chunks, then the tail; how many objects were published."""
        whole = len(tokens) // CHUNK * CHUNK
        stored = self._store(tokens[:whole], 0, order, marked, cost) if whole else 0
        if whole < len(tokens):
            stored += self._store(tokens, whole // CHUNK, order, marked, cost)
        return stored

    def _store(
        self, tokens: Sequence[int], first: int, order: str, marked: bool, cost: float
    ) -> int:
        keys = self.keys(tokens)
        num_tokens = min(CHUNK, len(tokens) - first * CHUNK)
        nbytes = -(-num_tokens // BLOCK) * BLOCK_BYTES
        parents = [None, *keys][first : len(keys)]
        marks = self.chain.marks(tokens[first * CHUNK :], parents, (), first * CHUNK)
        request = p.Reserve(
            1, self.namespace, b"".join(keys), first, 0,
            p.Template("native", order, "bfloat16", [1, nbytes], num_tokens, nbytes, CHUNK),
            cost, owner=self.owner, marks=b"".join(marks) if marked else b"",
        )  # fmt: skip
        reserved = at_once(self.node.reserve(self.client, request))
        sums = []
        for key, offset in zip(keys[first:], offsets_of(reserved.offsets), strict=True):
            data = payload(key, 0, order, nbytes)
            if offset >= 0:
                self.node.host.pool.view(offset + HEADER_BYTES, nbytes)[:] = data
            sums.append(checksum(data))
        commit = p.Commit(1, reserved.reservation, b"".join(sums))
        return at_once(self.node.commit(self.client, commit)).count

    def match(self, tokens: Sequence[int], orders: Sequence[str] = (ORDER,)) -> p.Matched:
        keys = b"".join(self.chain.keys(tokens))
        lengths = [PER_CHUNK * BLOCK_BYTES]
        request = p.Match(1, keys, [0], list(orders), lengths, self.owner)
        return at_once(self.node.match(self.client, request))

    def inside(
        self, tokens: Sequence[int], lease: int = 0, chunks: int = 0, **more: Any
    ) -> p.Nearest:
        """What begins as these tokens go on behind so many whole chunks."""
        parent = self.chain.keys(tokens)[chunks - 1] if chunks else None
        rest = tokens[chunks * CHUNK :][:CHUNK]
        (marks,) = self.chain.marks(rest, [parent], (), chunks * CHUNK)
        request = p.Inside(
            1, lease, marks, [0], more.pop("orders", [ORDER]), [BLOCK_BYTES], [BLOCK], self.owner,
            **more,
        )  # fmt: skip
        nearest = self.node.handle(self.client, request)
        assert isinstance(nearest, p.Nearest)
        return nearest

    def ask(self, tokens: Sequence[int]) -> tuple[p.Matched, p.Nearest]:
        """A match, and what there is inside behind it."""
        matched = self.match(tokens)
        found = len(matched.tiers)
        if len(tokens) - found * CHUNK < 16:
            return matched, p.Nearest(1, 0, 0)
        return matched, self.inside(tokens, matched.lease, found)

    async def brought(self, tokens: Sequence[int], chunks: int = 0) -> p.Nearest:
        """As `inside`; what is found is brought, is what was stored, and is let go of."""
        nearest = self.inside(tokens, chunks=chunks)
        if nearest.lease:
            arrived = await arrive(self.node, self.client, nearest.lease)
            assert not arrived.failed
            (offset,) = offsets_of(arrived.offsets)
            nbytes = -(-nearest.num_tokens // BLOCK) * BLOCK_BYTES
            assert stored_payload(self.node, offset, nbytes) == payload(nearest.key, nbytes=nbytes)
            self.release(nearest.lease)
        return nearest

    def release(self, lease: int, keep: int = 0) -> None:
        self.node.release(self.client, p.Release(lease, keep))


DOCUMENT = list(range(100, 100 + CHUNK))
FIRST = [*DOCUMENT, *range(1000, 1000 + CHUNK)]


def parting(at: int) -> list[int]:
    """A prompt that has so many tokens of the first one's, and others then."""
    return [*FIRST[:at], *range(5000, 5000 + 2 * CHUNK - at)]
