"""What an operator may want to know of a request that has ended, and where its tokens came from."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import msgspec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstrata.connectors.vllm.requests import RequestState

_HERE = ("host", "memory")  # tiers in host memory, the one of encoded objects too
_SOURCES = {"disk": CacheHitSource.DISK, "peer": CacheHitSource.P2P}
_ELSEWHERE = CacheHitSource.EXTERNAL_UNSPECIFIED


def record_of(state: RequestState, outcome: str, chunk_tokens: int) -> dict[str, Any]:
    """A request's record; see ``docs/reasons.md``."""
    return {
        "request": state.shown_id,
        "outcome": outcome,
        "tokens": state.request.num_tokens,
        "prompt_tokens": state.request.num_prompt_tokens,
        "host_tokens": state.hit_chunks["host"] * chunk_tokens,
        "slower_tokens": (state.hit_chunks.total() - state.hit_chunks["host"]) * chunk_tokens,
        "local_tokens": 0 if state.account is None else state.account.own,
        "loaded_tokens": state.loaded_tokens,
        "other_secret_tokens": state.other_tokens,
        "inside_tokens": state.inside_tokens,
        "met_tokens": state.met_tokens,
        "tier_tokens": state.tier_tokens(chunk_tokens),
        **_from(state),
        "load": state.loaded_how if state.loaded_tokens else "",
        "load_instead_s": round(_instead_s(state, chunk_tokens), 4),
        "stored_chunks": state.stored_chunks,
        "miss": state.bypass or state.miss,
        "reasons": _reasons(state, chunk_tokens),
        "first_key": state.keys[0].hex() if state.keys else "",
        "peer": state.peer_refused or state.roles.peer,
        **state.hints.record(),
        **({} if state.named is None else state.named.record()),
        **_plan(state),
        "seconds": round(time.monotonic() - state.arrived_at, 4),
        "arrived_at": state.arrived_at,  # for the node, which shows it to nobody
    }


def hit_sources(
    state: RequestState, num_external_tokens: int, chunk_tokens: int
) -> dict[CacheHitSource, int]:
    """Which tiers the tokens of a load come from, in vLLM's words."""
    sources, left = Counter[CacheHitSource](), num_external_tokens
    for tier, chunks in state.hit_chunks.items():
        if tier not in _HERE:
            count = min(left, chunks * chunk_tokens)  # a load may be cut within a chunk
            sources[_SOURCES.get(tier, _ELSEWHERE)] += count
            left -= count
    sources[CacheHitSource.HOST] = left
    return {source: count for source, count in sources.items() if count}


def _from(state: RequestState) -> dict[str, Any]:
    """Tokens that were loaded, by the engine that computed them; nothing where none share."""
    tokens, left = {}, state.loaded_tokens
    for engine, count in state.loaded_from.items():
        tokens[engine] = min(left, count)  # a load may be cut within an object
        left -= tokens[engine]
    return {"loaded_from": tokens} if state.engines else {}


def _instead_s(state: RequestState, chunk_tokens: int) -> float:
    """What computing the tokens that were loaded would have taken; 0: unknown."""
    start = state.local_tokens / chunk_tokens
    stop = start + state.loaded_tokens / chunk_tokens
    return state.chunk_s * (stop - start) + state.pair_s * (stop**2 - start**2) / 2


def _reasons(state: RequestState, chunk_tokens: int) -> list[dict[str, Any]]:
    """Why what was computed of the prompt was not loaded; nothing if it never got so far."""
    if state.account is None:
        return []
    unloaded = state.account.unloaded(state.request.num_prompt_tokens, chunk_tokens)
    return [msgspec.to_builtins(one) for one in unloaded]


def _plan(state: RequestState) -> dict[str, Any]:
    """What the node reckoned, and what came true."""
    if state.reckoned is None:
        return {}
    reckoned, began = state.reckoned, state.load_began or state.arrived_at
    ended = began + state.load_took
    return {
        "found_chunks": reckoned.found,
        "kept_chunks": len(reckoned.tiers),
        "load_s_expected": round(reckoned.load_s, 4),
        "load_s": round(state.load_took, 4),
        "rest_s_expected": round(reckoned.rest_s, 4),
        "all_s_expected": round(reckoned.compute_s, 4),
        "computed_s": round(max(0.0, state.computed_at - ended), 4),
    }
