"""Counts what engines say became of their requests, in tokens and seconds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kvstrata.observe.counters import Counters
from kvstrata.observe.reasons import Why
from kvstrata.observe.records import number

WHYS = frozenset(why.value for why in Why)


class RequestCounts:
    """Reads the numbers out of requests' records; what is none of them counts nothing.

    Args:
        counters: the node's.
        tiers: names of the node's tiers, host memory among them.
    """

    def __init__(self, counters: Counters, tiers: Collection[str]) -> None:
        self._counters = counters
        self._tiers = tiers

    def note(self, record: Mapping[str, Any]) -> None:
        """Count one request."""
        counters = self._counters
        counters.add("asked_tokens_total", number(record, "prompt_tokens"))
        counters.add("engine_tokens_total", number(record, "local_tokens"))
        by_tier = record.get("tier_tokens")
        if isinstance(by_tier, dict):
            for tier in self._tiers:
                if tokens := number(by_tier, tier):
                    counters.add("hit_tokens_total", tokens, tier=tier)
        reasons = record.get("reasons")
        for reason in reasons if isinstance(reasons, list) else ():
            why = reason.get("why") if isinstance(reason, dict) else None
            if isinstance(why, str) and why in WHYS:
                counters.add("computed_tokens_total", number(reason, "tokens"), why=why)
        how, took = record.get("load"), number(record, "load_s")
        if how in ("sync", "async") and took:
            counters.observe("load_seconds", took, load=how)
            if (computing := number(record, "load_instead_s")) > 0:
                saved = computing - took
                counters.add("ttft_saved_seconds_total", max(0.0, saved))
                counters.add("ttft_lost_seconds_total", max(0.0, -saved))
            if (expected := number(record, "load_s_expected")) > 0:
                counters.add("load_predicted_seconds_total", expected)
                counters.add("load_measured_seconds_total", took)
                counters.observe("load_error_ratio", took / expected)
