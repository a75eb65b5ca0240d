"""Prompts of real tokens as an engine asks for them, with how they begin and whose they are."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from tests.support.nodes import ORDER, RAW, SLOT, arrive, flush, make_backing, store

from kvstrata.config import Config, HostConfig, LeaseConfig
from kvstrata.heads import heads
from kvstrata.keys import KeyChain, Namespace, owner_digest
from kvstrata.memory.pool import Pool
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.observe.counters import Counters
from kvstrata.tiers.base import OwnedTier
from kvstrata.wire import protocol as p
from kvstrata.wire.namespaces import Described

SECRET = bytes(32)
NAMESPACE = Namespace(model="m", layout="l", chunk_tokens=128)
MODEL = {"name": "llama", "weights": "hub:llama@1", "configuration": "c1", "dtype": "bfloat16",
         "quantization": "None", "kv_cache_dtype": "auto", "max_model_len": "8192",
         "reset": "no"}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Tokens, and under what they are asked for."""

    tokens: Sequence[int]
    namespace: Namespace = NAMESPACE
    model: dict[str, str] = field(default_factory=lambda: MODEL)
    salt: str = ""

    @property
    def keys(self) -> list[bytes]:
        size = self.namespace.chunk_tokens
        chain = KeyChain(SECRET, self.namespace.digest(), size, self.salt)
        return chain.keys(self.tokens)

    @property
    def owner(self) -> bytes:
        return owner_digest(SECRET, self.namespace.tenant, self.salt)

    @property
    def heads(self) -> bytes:
        return heads(SECRET, self.tokens, self.namespace.chunk_tokens)

    def under(self, salt: str = "", details: dict[str, str] | None = None, **parts: Any) -> Prompt:
        """The same tokens under another namespace or salt."""
        namespace, model = replace(self.namespace, **parts), {**self.model, **(details or {})}
        return replace(self, namespace=namespace, salt=salt, model=model)


def prompt(rng: random.Random, chunks: int) -> Prompt:
    """Some chunks of tokens that no other prompt has."""
    return Prompt([rng.randrange(1 << 16) for _ in range(128 * chunks)])


class Asker:
    """An engine at a node that is called directly."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.client = Client("pid 1")

    def tell(self, *prompts: Prompt) -> None:
        """Say what their namespaces are made of."""
        for one in prompts:
            record = Described(one.namespace, one.model).record()
            self.node.record(self.client, p.Record(record))

    async def handle(self, message: p.Request) -> p.Reply | None:
        """What the node answers to any request."""
        answer = self.node.handle(self.client, message)
        return await answer if isinstance(answer, Awaitable) else answer

    async def match(self, one: Prompt, **more: Any) -> p.Matched:
        message = p.Match(
            1, b"".join(one.keys), [0], [ORDER], [RAW], one.owner, one.namespace.digest(),
            heads=one.heads, **more,
        )  # fmt: skip
        answer = self.node.match(self.client, message)
        return await answer if isinstance(answer, Awaitable) else answer

    async def why(self, one: Prompt, **more: Any) -> list[tuple[str, int, str, str]]:
        """Cause, chunks, tier and detail of what a match does not find."""
        matched = await self.match(one, **more)
        ready = 0
        while ready < len(matched.tiers):
            arrived = await arrive(self.node, self.client, matched.lease, ready)
            ready = arrived.ready
            if arrived.failed:
                break
        if matched.lease:
            self.node.release(self.client, p.Release(matched.lease))
        assert len(matched.tiers) + sum(one.chunks for one in matched.why) == len(one.keys)
        return [(one.why.value, one.chunks, one.tier, one.detail) for one in matched.why]

    async def keep(self, one: Prompt, first: int = 0) -> None:
        """Ask for a prompt, as every engine does, and store what is missing."""
        await self.why(one)
        store(self.node, self.client, one.keys, first)
        await flush(self.node, self.client)


@asynccontextmanager
async def a_node(
    *tiers: tuple[OwnedTier, int], slots: int = 40, per_client: float = 1, verify_every: int = 0
) -> AsyncIterator[Asker]:
    """A node with room for so many chunks, and with these tiers, each with room for so many.

    Ends with the conservation laws.
    """
    counters = Counters()
    config = Config(
        host=HostConfig(capacity=slots * SLOT, policy="lru", verify_every=verify_every),
        leases=LeaseConfig(per_client=Fraction(per_client), total=Fraction(1)),
    )
    backings = [make_backing(tier, room, counters=counters) for tier, room in tiers]
    node = Node(config, Pool.create(slots * SLOT), backings, counters)
    await node.start()
    try:
        yield Asker(node)
        node.check_integrity(contents=True)
    finally:
        await node.stop(drain_s=1.0)
