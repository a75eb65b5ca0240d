"""What of a prompt lies in an object that begins as the prompt goes on behind its whole chunks.

Only where vLLM itself has none of it, and for models whose layers are all attention. What it
brings is less than a chunk, so a step is spent on it only where that is the shorter one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstrata.connectors.vllm.groups import Group, Groups
from kvstrata.connectors.vllm.requests import Beginning, RequestState
from kvstrata.errors import KVStrataError
from kvstrata.header import MARK_TOKENS
from kvstrata.parts import PORTABLE
from kvstrata.wire import protocol as p
from kvstrata.wire.client import Call, NodeClient, offsets_of

logger = logging.getLogger(__name__)


def is_next(state: RequestState) -> bool:
    """Whether the node is to be asked what begins as a prompt goes on, behind what was found."""
    if not state.parts_inside or state.asked_inside or state.chain is None or state.failed:
        return False
    if state.taint is not None:
        return False  # it might go beyond where the request is exact
    num_chunks = len(state.tiers)
    if num_chunks > len(state.keys) or state.found[:num_chunks] != state.keys[:num_chunks]:
        return False  # by the other secret
    if state.reckoned is not None and num_chunks < state.reckoned.found:
        return False  # computing is faster
    if state.reckoned is not None and state.reckoned.meet:
        return False  # it would come behind all the others, which are brought from their end
    return num_tokens(state) > MARK_TOKENS


def num_tokens(state: RequestState) -> int:
    """Tokens that may be found behind what was found, and that vLLM has not."""
    assert state.chain is not None
    start, size = len(state.tiers) * state.chain.chunk_tokens, state.chain.chunk_tokens
    return min(_end(state), start + size) - max(state.own_tokens, start)


def ask(
    state: RequestState,
    client: NodeClient,
    parts: list[int],
    orders: list[str],
    lengths: Sequence[int],
    needs: list[int],
    groups: Groups,
    owners: Sequence[Group],
    token_s: float,
) -> Call:
    """Begin to ask, see `kvstrata.wire.protocol.Inside`.

    Args:
        lengths: payload bytes of each part of a chunk.
        needs: of each part, as a match says it; none: every chunk of each.
        groups: the engine's.
        owners: of each part that of them which it is of.
        token_s: seconds that computing a token takes.

    Raises:
        NodeUnavailable: the node has gone.
    """
    assert state.chain is not None
    number, size = len(state.tiers), state.chain.chunk_tokens
    # Of a prompt's last token, too, which is computed: an object may end with it.
    stop = min(state.request.num_tokens, state.hints.load_limit, (number + 1) * size)
    marks = state.marks(range(number, number + 1), stop)
    per_block = [
        length // groups.width(group) for length, group in zip(lengths, owners, strict=True)
    ]
    # The chunk that it becomes a part of is stored, so nothing that a lossy codec keeps.
    native = [order for order in orders if order != PORTABLE]
    return client.begin(
        p.Inside, p.Nearest, state.lease, marks, parts, native, per_block,
        [group.block_tokens for group in owners], state.owner, token_s, state.hints.tiers, needs,
    )  # fmt: skip


def hear(state: RequestState, call: Call, client: NodeClient | None) -> None:
    """Take in what was found, if it is of use."""
    assert state.chain is not None
    try:
        reply: p.Nearest = call.wait(0)
    except KVStrataError as error:
        logger.debug("KVStrata: request %s: %s", state.request.request_id, error)
        return
    if not reply.lease:
        return
    number, size = len(state.tiers), state.chain.chunk_tokens
    good, end = reply.good_tokens, reply.num_tokens
    # No mark covers the last ones of a tail; its key does.
    may_be = good < end < min(good + MARK_TOKENS, size)
    if may_be and state.end_at(number * size + end) == reply.key:
        good = end
    good = min(good, _end(state) - number * size)
    if number * size + good <= state.own_tokens:
        if client is not None:
            client.release(reply.lease, reply.have)
        return
    state.lease = reply.lease
    state.found = [*state.found[:number], reply.key]
    state.tiers += bytes([reply.tier])
    state.offsets.extend(offsets_of(reply.offsets))
    state.beginning = Beginning(reply.num_tokens, good)
    if state.miss in ("not stored", "shorter than a chunk"):
        state.miss = "partly stored"


def _end(state: RequestState) -> int:
    """Tokens of the request that may be loaded."""
    return int(min(state.reach, state.hints.load_limit))
