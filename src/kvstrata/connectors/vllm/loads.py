"""What a load brings into which blocks, once vLLM has given a request its blocks."""

from __future__ import annotations

from typing import Any

from kvstrata.connectors.vllm.groups import Groups
from kvstrata.connectors.vllm.lookups import Lookups
from kvstrata.connectors.vllm.messages import Load
from kvstrata.connectors.vllm.requests import RequestState


def load_of(
    state: RequestState, lookups: Lookups, groups: Groups, blocks: Any, num_external: int
) -> Load:
    """Describe a request's load for the workers; of the lease only what it needs is kept.

    Args:
        state: of the request, with what was found.
        lookups: know the node.
        groups: the engine's.
        blocks: the request's, as vLLM gives them.
        num_external: tokens that vLLM wants loaded, at least one.
    """
    chunk, end = groups.chunk_tokens, state.local_tokens + num_external
    first, last = state.local_tokens // chunk, -(-end // chunk)
    parts, client = lookups.parts, lookups.client
    if not groups.prefix_only and end != state.num_found(chunk):
        # What the groups need at another boundary was not asked for: it fails, and is computed.
        last = first
    elif last < len(state.tiers) and client is not None:
        client.release(state.lease, keep=last)
    return Load(
        request_id=state.request.request_id,
        node=client.hello.node if client is not None else b"",
        lease=state.lease,
        first_chunk=first,
        offsets=[
            state.offsets[i * len(parts) : (i + 1) * len(parts)].tolist()
            for i in range(first, last)
        ],
        keys=state.found[first:last],
        blocks=groups.targets(
            blocks.get_block_ids(), range(state.local_tokens, end), range(first, last)
        ),
        parts=parts,
        whole=not groups.prefix_only,
        tail_tokens=state.last_tokens(last, chunk),
        tail_marks=state.last_marks(last, chunk),
        followed=state.roles.running,
    )
