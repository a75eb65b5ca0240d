"""Each token of a prompt is the engine's, loaded, or has one reason."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.connectors.vllm.reasons import Account
from kvstrata.observe.reasons import Reason, Why

CHUNK = 16
EVICTED, NEVER = Reason(Why.EVICTED, 2, "disk", "", 3.0), Reason(Why.NEVER, 3)


def told(account: Account, prompt: int) -> list[tuple[Why, int]]:
    return [(one.why, one.tokens) for one in account.unloaded(prompt, CHUNK)]


def test_what_the_node_said() -> None:
    account = Account(own=0, granted=32, found=2, why=[EVICTED, NEVER])
    evicted, never, end = account.unloaded(7 * CHUNK + 5, CHUNK)
    assert (evicted.why, evicted.tokens) == (Why.EVICTED, 32)
    assert (evicted.tier, evicted.ago_s) == ("disk", 3.0)
    assert (never.why, never.tokens) == (Why.NEVER, 48)
    assert (end.why, end.tokens) == (Why.PARTIAL, 5)


def test_the_engine_s_own_tokens_have_no_reason() -> None:
    account = Account(own=40, granted=40, found=1, why=[EVICTED, NEVER])
    assert told(account, 6 * CHUNK) == [(Why.EVICTED, 8), (Why.NEVER, 48)]


def test_all_but_one_token() -> None:
    assert told(Account(0, 63, 4, []), 64) == [(Why.LAST, 1)]
    assert told(Account(0, 64, 4, []), 65) == [(Why.PARTIAL, 1)]
    assert told(Account(0, 64, 4, []), 64) == []


def test_what_the_engine_did_not_take() -> None:
    assert told(Account(16, 16, 3, [EVICTED]), 5 * CHUNK) == [(Why.ENGINE, 32), (Why.EVICTED, 32)]


def test_trouble() -> None:
    account = Account(16, 16, 0, [EVICTED], Why.BYPASSED, "embeddings")
    (bypassed, end) = account.unloaded(4 * CHUNK + 1, CHUNK)
    assert (bypassed.why, bypassed.tokens, bypassed.detail) == (Why.BYPASSED, 48, "embeddings")
    assert (end.why, end.tokens) == (Why.PARTIAL, 1)


def test_a_load_that_ended_early() -> None:
    account = Account(0, 64, 4, [NEVER])
    account.end_at(32, "ab", "disk")
    (failed, never) = account.unloaded(7 * CHUNK, CHUNK)
    assert (failed.why, failed.tokens, failed.key) == (Why.FAILED, 32, "ab")
    assert failed.tier == "disk"
    assert (never.why, never.tokens) == (Why.NEVER, 48)
    # vLLM's own tokens are not among those that did not come.
    account = Account(16, 64, 4, [])
    account.end_at(0, "ab", "disk")
    assert told(account, 64) == [(Why.FAILED, 48)]


def test_more_chunks_than_a_match_names() -> None:
    account = Account(0, 16, 1, [])
    (capped,) = account.unloaded(3 * CHUNK, CHUNK)
    assert (capped.why, capped.tokens, capped.detail) == (Why.CAPPED, 32, "message")


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(0, 12),
    st.lists(st.builds(Reason, st.sampled_from(Why), st.integers(1, 5)), max_size=4),
    st.sampled_from([None, Why.NO_NODE, Why.BYPASSED, Why.DEADLINE]),
    st.one_of(st.none(), st.integers(0, 200)),
)
def test_every_token_is_accounted_for(
    prompt: int,
    own: int,
    external: int,
    found: int,
    why: list[Reason],
    trouble: Why | None,
    came: int | None,
) -> None:
    own = min(own, prompt)
    granted = min(own + external, prompt)
    account = Account(own, granted, found, why, trouble)
    if came is not None:
        account.end_at(came, "", "")
    have = granted if account.came is None else account.came
    reasons = account.unloaded(prompt, CHUNK)
    assert own <= have <= granted
    assert sum(one.tokens for one in reasons) == prompt - have
    assert all(one.tokens > 0 for one in reasons)
