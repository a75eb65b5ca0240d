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
    if load.failed:
        count = max(load.found, len(load.keys) if not load.found else 0) - load.loaded
        key = load.keys[load.loaded].hex() if load.loaded < len(load.keys) else ""
        reasons.append(Unloaded(Why.FAILED, count * chunk_tokens, key=key))
        at = load.loaded + count
    else:
        at = load.found
    for reason in load.why:
        count = min(reason.chunks, len(load.keys) - at)
        if count > 0:
            reasons.append(
                Unloaded(reason.why, count * chunk_tokens, reason.tier, reason.detail, reason.ago_s)
            )
            at += count
    if at < len(load.keys):
        left = (len(load.keys) - at) * chunk_tokens
        reasons.append(Unloaded(Why.CAPPED, left, detail="message"))
    rest = prompt_tokens - len(load.keys) * chunk_tokens
    why = Why.PARTIAL if rest < chunk_tokens else Why.LAST
    return [*reasons, Unloaded(why, rest)]
