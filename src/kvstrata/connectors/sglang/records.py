"""What an operator may want to know of a prefetch: where its pages came from, and why others not.

SGLang tells a storage no request's name, so a prefetch is called by its first page's hash.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from kvstrata.connectors.sglang.holds import Hold
from kvstrata.observe.reasons import Reason, Unloaded, Why

_HERE = ("host", "memory")


def record_of(
    hold: Hold, page_tokens: int, names: Sequence[str], *, shares: bool = False
) -> dict[str, Any]:
    """A prefetch's record; see ``docs/reasons.md``.

    Args:
        hold: that has ended.
        page_tokens: tokens of a page.
        names: of the tiers, by number.
        shares: whether other engines have its namespace, too.
    """
    held = (hold.tiers[number] for number in hold.loaded)
    tiers = Counter(names[tier] for tier in held if tier < len(names))
    here = sum(tiers[name] for name in _HERE)
    found = len(hold.hashes)
    return {
        "request": f"sglang {hold.first.hex()[:16]} {hold.before * page_tokens}",
        "outcome": "prefetched" if hold.loaded else "not prefetched",
        "tokens": (hold.before + hold.asked) * page_tokens,
        "prompt_tokens": (hold.before + hold.asked) * page_tokens,
        "host_tokens": here * page_tokens,
        "slower_tokens": (tiers.total() - here) * page_tokens,
        "local_tokens": hold.before * page_tokens,
        "loaded_tokens": len(hold.loaded) * page_tokens,
        "tier_tokens": _tokens(tiers, page_tokens),
        **({"loaded_from": _tokens(_engines(hold), page_tokens)} if shares else {}),
        "load": "prefetch" if hold.loaded else "",
        "load_s": round(hold.load_s, 4),
        "miss": "" if found == hold.asked else "partly stored" if found else "not stored",
        "reasons": [msgspec.to_builtins(one) for one in _reasons(hold, page_tokens)],
        "first_key": hold.first.hex(),
        "seconds": round(time.monotonic() - hold.began, 4),
        "arrived_at": hold.began,
    }


def _engines(hold: Hold) -> Counter[str]:
    """The pages that were read, by the engine that computed them."""
    return Counter(hold.origins[number] for number in hold.loaded)


def _tokens(pages: Counter[str], page_tokens: int) -> dict[str, int]:
    return {name: count * page_tokens for name, count in pages.items()}


def _reasons(hold: Hold, page_tokens: int) -> list[Unloaded]:
    """Why pages were not loaded, in their order."""
    found, reasons = len(hold.hashes), []
    left = [number for number in range(found) if number not in hold.loaded]
    failed = [number for number in left if 0 <= hold.failed <= number]
    if len(left) > len(failed):
        reasons.append(Unloaded(Why.ENGINE, (len(left) - len(failed)) * page_tokens))
    if failed:
        key = hold.keys[failed[0]].hex()
        reasons.append(Unloaded(Why.FAILED, len(failed) * page_tokens, key=key))
    at = found
    for reason in hold.why:
        count = min(reason.chunks, hold.asked - at)
        if count > 0:
            reasons.append(_unloaded(reason, count * page_tokens))
            at += count
    if at < hold.asked:
        reasons.append(Unloaded(Why.CAPPED, (hold.asked - at) * page_tokens, detail="message"))
    return reasons


def _unloaded(reason: Reason, tokens: int) -> Unloaded:
    return Unloaded(reason.why, tokens, reason.tier, reason.detail, reason.ago_s)
