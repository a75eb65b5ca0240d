"""What keeps KV that is not exact from whoever asked for exact: vLLM's own prefix cache, and its
readers.

vLLM finds blocks by hashes that chain from a prompt's beginning. From the first block on that holds
a token which is not exact a request's hashes are made to chain from random bytes, so nothing that
another request asks for ever equals them, and neither do those of the tokens that it has yet to
make. vLLM publishes such blocks with its events all the same, with their tokens; so what was
published is withdrawn behind it.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.kv_events import MEDIUM_GPU, BlockRemoved
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash


def may_be_poisoned(request: Any, first: int, hash_tokens: int) -> bool:
    """Whether the hashes of a request can be kept apart from token ``first`` on.

    Args:
        request: vLLM's.
        first: position of the first token that is not exact.
        hash_tokens: that each of its hashes is of.
    """
    caches = request._block_hasher is not None
    return not caches or first // hash_tokens < len(request.block_hashes)


def poison(request: Any, first: int, hash_tokens: int) -> None:
    """Keep a request's hashes apart from token ``first`` on, for its life."""
    number = first // hash_tokens
    if number < len(request.block_hashes):
        length = len(request.block_hashes[number])
        request.block_hashes[number:] = [BlockHash(os.urandom(length))]
        request.update_block_hashes()


class Withdrawals:
    """Of what vLLM publishes of poisoned requests; on the scheduler's one thread.

    Args:
        hash_tokens: that each of a request's hashes is of.
        per_block: how many of these a block has.
        group: number of the layer group that is told of.
    """

    def __init__(self, hash_tokens: int, per_block: int, group: int) -> None:
        self._hash_tokens, self._per_block, self._group = hash_tokens, per_block, group
        self._next: dict[str, int] = {}  # of each, the first block that is not published yet
        self._gone: list[Any] = []

    def begin(self, request: Any, first: int) -> None:
        """This request was poisoned."""
        self._next[request.request_id] = first // (self._hash_tokens * self._per_block)

    def computes(self, request: Any, num_tokens: int) -> None:
        """A step was planned, after which so many tokens are there: vLLM publishes their blocks."""
        if (block := self._next.get(request.request_id)) is None:
            return
        hashes, size = request.block_hashes, self._per_block
        stop = min(num_tokens // self._hash_tokens, len(hashes)) // size
        self._gone += [hashes[(number + 1) * size - 1] for number in range(block, stop)]
        self._next[request.request_id] = max(block, stop)

    def end(self, request_id: str) -> None:
        """A request has ended; nothing more of it will be published."""
        self._next.pop(request_id, None)

    def take(self) -> list[BlockRemoved]:
        """What is to be published behind vLLM's own events."""
        gone, self._gone = [maybe_convert_block_hash(one) for one in self._gone], []
        if not gone:
            return []
        return [BlockRemoved(block_hashes=gone, medium=MEDIUM_GPU, group_idx=self._group)]
