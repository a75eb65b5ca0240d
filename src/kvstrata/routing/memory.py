"""What a router remembers of the prompts that it sent: where they went, and which begin alike."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstrata.routing.base import Prompt

MAX_NODES = 256
"""Nodes that are remembered."""
MAX_CHUNKS = 1 << 20
"""Chunks of all nodes that are; they take about 200 MB."""
PERIOD = 1024
"""Prompts after which counts are halved: what was common an hour ago may not be now."""
COMMON = 1 / 16
"""Share of all prompts that begin alike, from which on they need not go to the same place."""
AT_LEAST = 64
"""Prompts that must have been seen before what is common is told from chance."""


class Sent:
    """Which chunks each node was sent lately: about what its cache has, if that is as large.

    Bounded: of each node the chunks, and of all the nodes, that were not sent for longest are
    forgotten.

    Args:
        cache_tokens: what a node holds, in all its tiers.
    """

    def __init__(self, cache_tokens: int) -> None:
        self._cache_tokens = cache_tokens
        self._chunks: OrderedDict[str, OrderedDict[bytes, None]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._chunks.values()))

    def add(self, prompt: Prompt, node: str) -> None:
        """It went there."""
        chunks = self._chunks.setdefault(node, OrderedDict())
        self._chunks.move_to_end(node)
        for key in reversed(prompt.keys):  # a tail is forgotten before its head
            chunks[key] = None
            chunks.move_to_end(key)
        while len(chunks) * prompt.chunk_tokens > self._cache_tokens:
            chunks.popitem(last=False)
        while len(self._chunks) > MAX_NODES or (len(self) > MAX_CHUNKS and len(self._chunks) > 1):
            self._chunks.popitem(last=False)

    def leading(self, prompt: Prompt, nodes: Iterable[str]) -> dict[str, int]:
        """Leading tokens of it that each node was sent; nodes with none are left out."""
        found = {}
        for node in nodes:
            chunks = self._chunks.get(node)
            if chunks and prompt.keys and prompt.keys[0] in chunks:
                # Who has a chunk has all before it.
                count = bisect_left(prompt.keys, True, key=lambda key: key not in chunks)
                found[node] = count * prompt.chunk_tokens
        return found


class Popularity:
    """How many of the prompts lately begin with which chunks.

    A chunk is counted only where the one before it is common, so memory is bounded by the prompts
    of two periods and the length of what they share.
    """

    def __init__(self) -> None:
        self._counts: dict[bytes, float] = {}
        self._total = 0.0
        self._until_halved = PERIOD

    def __len__(self) -> int:
        return len(self._counts)

    def depth(self, keys: Sequence[bytes]) -> int:
        """Leading chunks that it takes until what they make up is not common; 1 more than there
        are if all of it is."""
        common = COMMON * max(self._total, AT_LEAST)
        for number, key in enumerate(keys):
            if self._counts.get(key, 0.0) <= common:
                return number + 1
        return len(keys) + 1

    def add(self, keys: Sequence[bytes]) -> None:
        """A prompt came."""
        for key in keys[: self.depth(keys)]:
            self._counts[key] = self._counts.get(key, 0.0) + 1.0
        self._total += 1.0
        self._until_halved -= 1
        if not self._until_halved:
            self._until_halved = PERIOD
            self._total /= 2
            halved = {key: count / 2 for key, count in self._counts.items()}
            self._counts = {key: count for key, count in halved.items() if count >= 1.0}
