"""Every token of a prefetch was SGLang's, was loaded, or has one reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.connectors.sglang.holds import Hold
from kvstrata.connectors.sglang.loads import BASE_S, EACH_1024_TOKENS_S, MOST_S, patience_s
from kvstrata.connectors.sglang.records import record_of
from kvstrata.observe.reasons import Reason, Why

PAGE = 64
NAMES = ["host", "disk", "redis"]


def a_hold(found: int, asked: int, before: int = 0, why: Any = (), tiers: bytes = b"") -> Hold:
    client: Any = None
    return Hold(
        client=client, lease=1, generation="", hashes=[str(n) for n in range(found)],
        keys=[bytes([n % 256]) for n in range(found)], parts=(0,), offsets=[0] * found,
        tiers=tiers or bytes(found), first=b"first", before=before, asked=asked, why=why,
    )  # fmt: skip


@given(st.data())
def test_tokens_add_up(data: st.DataObject) -> None:
    found = data.draw(st.integers(0, 12))
    asked = found + data.draw(st.integers(0, 12))
    causes = st.builds(Reason, st.sampled_from(Why), st.integers(1, 9))
    tiers = bytes(data.draw(st.lists(st.integers(0, 2), min_size=found, max_size=found)))
    hold = a_hold(
        found, asked, data.draw(st.integers(0, 5)), data.draw(st.lists(causes, max_size=4)), tiers
    )
    # SGLang reads what it likes, in pieces, and twice where two prompts begin alike.
    for _ in range(data.draw(st.integers(0, 3)) if found else 0):
        start = data.draw(st.integers(0, found - 1))
        hold.loaded.update(range(start, data.draw(st.integers(start, found))))
    hold.failed = data.draw(st.integers(-1, found - 1)) if found else -1
    record = record_of(hold, PAGE, NAMES)
    reasons = sum(one["tokens"] for one in record["reasons"])
    assert record["loaded_tokens"] + reasons == asked * PAGE
    assert record["local_tokens"] + record["loaded_tokens"] + reasons == record["tokens"]
    assert all(one["tokens"] > 0 for one in record["reasons"])
    assert sum(record["tier_tokens"].values()) == record["loaded_tokens"]
    assert record["host_tokens"] + record["slower_tokens"] == record["loaded_tokens"]
    assert record["outcome"] == ("prefetched" if hold.loaded else "not prefetched")


def test_a_page_that_did_not_come_is_named() -> None:
    hold = a_hold(6, 9, why=[Reason(Why.EVICTED, 2, "host")])
    hold.loaded.update({0, 1, 2})
    hold.failed = 3
    record = record_of(hold, PAGE, NAMES)
    assert record["reasons"] == [
        {"why": "the load failed", "tokens": 3 * PAGE, "key": "03"},
        {"why": "evicted", "tokens": 2 * PAGE, "tier": "host"},
        {"why": "capped", "tokens": PAGE, "detail": "message"},
    ]
    assert record["miss"] == "partly stored"


def test_what_sglang_left_is_its_own_choice() -> None:
    hold = a_hold(6, 6)
    hold.loaded.update({2, 3})
    assert record_of(hold, PAGE, NAMES)["reasons"] == [
        {"why": "the engine took less", "tokens": 4 * PAGE}
    ]
    assert record_of(hold, PAGE, NAMES)["miss"] == ""


@pytest.mark.parametrize("num_tokens", [0, 64, 1024, 128 * 64, 128 * 128, 10**6])
def test_a_read_ends_before_sglang_gives_it_up(num_tokens: int) -> None:
    sglangs = 1.0 + 0.25 * num_tokens / 1024
    assert patience_s(num_tokens, 1000.0) <= sglangs - 0.25
    expected = BASE_S + EACH_1024_TOKENS_S * num_tokens / 1024
    assert patience_s(num_tokens, 1000.0) == min(MOST_S, expected)
    assert patience_s(num_tokens, 0.1) == 0.1
