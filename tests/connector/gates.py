"""Doors that a test shuts and opens: before the node's answers, and before a tier's reads."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvstrata.config import Config
from kvstrata.memory.pool import Pool
from kvstrata.node.node import Node
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.observe.counters import Counters
from kvstrata.policies import create_policy
from kvstrata.tiers.base import Outcome, OwnedTier
from kvstrata.tiers.memory import MemoryTier

TIMEOUT_S = 30.0


class Gate:
    """Requests of one type that a node has heard and does not answer yet."""

    def __init__(self, node: InProcessNode, message: type) -> None:
        self.num_asked = 0
        self._node = node
        self._event = node.run(_make_event)
        handlers = node.node._handlers
        real = handlers[message]

        async def later(client: Any, asked: Any) -> Any:
            await self._event.wait()
            answer = real(client, asked)
            return await answer if inspect.isawaitable(answer) else answer

        def hold(client: Any, asked: Any) -> Any:
            self.num_asked += 1
            return later(client, asked)

        handlers[message] = hold

    def open(self) -> None:
        self._node.run(self._event.set)


async def _make_event() -> asyncio.Event:
    return asyncio.Event()


class GatedTier(MemoryTier):
    """A slow tier whose reads wait until somebody opens the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.opened.set()
        self.num_reads = 0

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        self.num_reads += len(ids)
        self.opened.wait(TIMEOUT_S)
        return super().read(ids, into)


def tiered(tier: OwnedTier, deadline_s: float = TIMEOUT_S) -> Callable[[Config], Node]:
    """Makes nodes that keep everything in this tier too."""

    def make(config: Config) -> Node:
        counters = Counters()
        backing = OwnedBacking(
            tier,
            1 << 30,
            create_policy("lru", 1 << 30, time.monotonic),
            num_threads=2,
            queue_bytes=1 << 30,
            deadline_s=deadline_s,
            counters=counters,
            clock=time.monotonic,
        )
        capacity = config.host.capacity
        assert isinstance(capacity, int)
        return Node(config, Pool.create(capacity), [backing], counters)

    return make
