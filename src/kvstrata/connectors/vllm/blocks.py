"""Which of vLLM's blocks a load fills, and which a step may overwrite."""

from __future__ import annotations

from typing import Any


def target_blocks(
    block_ids: list[int], tokens: range, chunks: range, block_tokens: int, chunk_tokens: int
) -> list[int]:
    """The blocks of these chunks, -1 for those that hold none of these tokens.

    Args:
        block_ids: of the request, from its first token on.
    """
    per_chunk = chunk_tokens // block_tokens
    last = min(-(-tokens.stop // block_tokens), len(block_ids))
    wanted = range(tokens.start // block_tokens, last)
    return [
        block_ids[i] if i in wanted else -1
        for i in range(chunks.start * per_chunk, chunks.stop * per_chunk)
    ]


def fresh_blocks(scheduler_output: Any, block_tokens: int) -> set[int]:
    """Blocks that this step may overwrite although an earlier step's store reads them."""
    fresh: set[int] = set(scheduler_output.new_block_ids_to_zero or ())
    for new in scheduler_output.scheduled_new_reqs:
        fresh.update(new.block_ids[0][new.num_computed_tokens // block_tokens :])
    cached = scheduler_output.scheduled_cached_reqs
    for i, request_id in enumerate(cached.req_ids):
        if (ids := cached.new_block_ids[i]) is not None:
            skip = (
                cached.num_computed_tokens[i] // block_tokens
                if request_id in cached.resumed_req_ids
                else 0
            )
            fresh.update(ids[0][skip:])
    for copy in scheduler_output.kv_cache_block_copies or ():
        fresh.add(copy.dst_block_id)
    return fresh
