"""What another engine computes for a request that is decoded here: what of it is waited for.

All that is asked for, as long as any part of a prefix can be loaded. With several groups a load is
of use whole or not at all, so only an end is waited for that the other engine stores of each group:
of attention the prompt's, of states that of the last block before the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.config import DeadlineConfig
from kvstrata.connectors.vllm.groups import Group, Groups
from kvstrata.connectors.vllm.requests import RequestState

WRITTEN_S = 1.0
"""How long a prompt that has been computed elsewhere may take to be stored there."""


def expected_s(state: RequestState, groups: Groups, deadlines: DeadlineConfig) -> float:
    """How long to wait for each chunk more that the peer of a request has yet to store."""
    if not state.roles.peer or state.in_vain or not _end_comes(state, groups):
        return 0.0
    return deadlines.load if state.roles.running else WRITTEN_S


def ask_for_what_is_there(state: RequestState) -> None:
    """What was to come for a prompt's end did not: a shorter boundary may do, without waiting."""
    state.expects_end, state.in_vain = False, True
    state.account = None
    state.hit_chunks.clear()


def tail_lengths(
    state: RequestState, groups: Groups, owners: Sequence[Group], lengths: Sequence[int]
) -> list[int]:
    """Payload bytes of each part of a prompt's end, where its question has one: so many blocks.

    Args:
        groups: the engine's.
        owners: of each part that of them which it is of.
        lengths: payload bytes of each part of a whole chunk.
    """
    if len(state.question) <= len(state.keys):
        return []
    tokens = state.request.num_prompt_tokens % groups.chunk_tokens
    return [
        length // groups.width(group) * -(-tokens // group.block_tokens)
        for length, group in zip(lengths, owners, strict=True)
    ]


def _end_comes(state: RequestState, groups: Groups) -> bool:
    """Whether the other engine stores what the end of the question needs, of every group."""
    if groups.prefix_only:
        return True
    request, end = state.request, len(state.question) * groups.chunk_tokens
    if request.num_tokens != request.num_prompt_tokens:
        return False
    last = int(request.num_prompt_tokens) - 1
    return all(
        last // group.block_tokens * group.block_tokens == end
        for group in groups.each
        if group.kind == "recurrent"
    )
