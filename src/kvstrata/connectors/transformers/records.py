"""What an operator may want to know of a call: where its tokens came from, and why others not."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from kvstrata.connectors.transformers.loads import Load
from kvstrata.observe.reasons import Unloaded, Why

_HERE = ("host", "memory")
_numbers = itertools.count(1)


def record_of(
    load: Load, prompt_tokens: int, tokens: int, chunk_tokens: int, began: float,
    names: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """A call's record; see ``docs/reasons.md``.

    Args:
        load: what came of asking for its prompt.
        tokens: of prompt and answer.
        chunk_tokens: tokens of a chunk.
        began: when, by the monotonic clock.
        names: of the tiers, by number.
    """
    where = [names[tier] for tier in load.tiers[: load.loaded] if tier < len(names)]
    tiers = Counter(where)
    here = sum(tiers[name] for name in _HERE)
    missing = load.found < len(load.keys)
    return {
        "request": f"transformers {os.getpid()}-{next(_numbers)}",
        "outcome": "finished",
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "host_tokens": here * chunk_tokens,
        "slower_tokens": (tiers.total() - here) * chunk_tokens,
        "local_tokens": 0,
        "loaded_tokens": load.loaded * chunk_tokens,
        "tier_tokens": {name: count * chunk_tokens for name, count in tiers.items()},
        "load": "synchronous" if load.loaded else "",
        "load_s": round(load.seconds, 4),
        "miss": load.failed
        or (("partly stored" if load.found else "not stored") if missing else ""),
        "reasons": [
            msgspec.to_builtins(one) for one in _reasons(load, prompt_tokens, chunk_tokens)
        ],
        **({"loaded_from": dict(load.origins)} if load.shared else {}),
        "first_key": load.keys[0].hex() if load.keys else "",
        "seconds": round(time.monotonic() - began, 4),
        "arrived_at": began,
    }


def _reasons(load: Load, prompt_tokens: int, chunk_tokens: int) -> list[Unloaded]:
    """Why tokens were computed, in their order, each once."""
    reasons: list[Unloaded] = []
    at = load.loaded

    def until(chunk: int, why: Why, tier: str = "", detail: str = "", ago_s: float = 0.0) -> None:
        nonlocal at
        if (count := min(chunk, len(load.keys)) - at) > 0:
            key = load.keys[at].hex() if why is Why.FAILED else ""
            reasons.append(Unloaded(why, count * chunk_tokens, tier, detail, ago_s, key))
            at += count

    trouble = Why.DEADLINE if load.too_late else Why.FAILED
    if load.failed:
        until(load.found or len(load.keys), trouble)
    for reason in load.why:
        until(at + reason.chunks, reason.why, reason.tier, reason.detail, reason.ago_s)
    until(len(load.keys), Why.CAPPED, detail="message")
    rest = prompt_tokens - len(load.keys) * chunk_tokens
    if load.failed and not load.keys:
        return [Unloaded(trouble, rest)]
    return [*reasons, Unloaded(Why.PARTIAL if rest < chunk_tokens else Why.LAST, rest)]
