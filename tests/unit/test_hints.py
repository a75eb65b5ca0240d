"""What a client says of the cache: what is taken, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstrata.blend.segments import asked
from kvstrata.config import load_config
from kvstrata.config.kinds import HINTS
from kvstrata.connectors.hints import MAX_UNKNOWN, NO_LIMIT, OF_PEERS, Hints, forwarded, hints
from kvstrata.node.operating.pinning import MAX_NAME_CHARS
from kvstrata.node.records import MAX_RECORD_BYTES
from kvstrata.policies.base import PRIORITIES

GOOD: dict[str, Any] = {
    "max_load_tokens": 512,
    "max_store_tokens": 1024,
    "store": True,
    "load": True,
    "session": "Zoë's chat 7",
    "pin": 3600,
    "priority": 2,
    "tiers": ["host", "disk"],
    "blend": {"segments": [[0, 40]], "plan": "edges", "ratio": 0.25},
}
TAKEN: dict[str, Any] = {**GOOD, "blend": asked(GOOD["blend"])}
BAD: list[tuple[str, Any, str]] = [
    ("max_load_tokens", -1, ">= 0"),
    ("max_load_tokens", 1.5, "got `float`"),
    ("max_load_tokens", True, "got `bool`"),
    ("max_store_tokens", 10**30, "<= 1099511627776"),
    ("store", "no", "got `str`"),
    ("load", 0, "got `int`"),
    ("session", "", "length >= 1"),
    ("session", "x" * 101, "length <= 100"),
    ("session", "two\nlines", "printable"),
    ("session", "\ud800", "printable"),
    ("pin", 0, ">= 1"),
    ("pin", 7 * 86400 + 1, "<= 604800"),
    ("pin", float("nan"), "got `float`"),
    ("priority", -2, ">= -1"),
    ("priority", 4, "<= 3"),
    ("tiers", [], "length >= 1"),
    ("tiers", ["disk"] * 17, "length <= 16"),
    ("tiers", "disk", "got `str`"),
    ("tiers", ["disk", 3], "got `int`"),
    ("tiers", ["a\x1b[2J"], "printable"),
    ("blend", {"segments": [[0, 40]], "plan": "best"}, "Invalid enum value"),
    ("blend", {"separator": "x", "segments": [[0, 40]]}, "either segments or separator"),
    ("blend", True, "Expected `object`"),
]


def sent(ours: Any) -> dict[str, Any]:
    return {"kvstrata": ours}


def test_every_hint_is_taken_as_it_is() -> None:
    assert GOOD.keys() == set(HINTS)
    taken = hints(sent(GOOD), HINTS)
    assert taken == Hints(TAKEN, {})
    assert (taken.load_limit, taken.store_limit) == (512, 1024)
    assert (taken.pin_s, taken.priority, taken.tiers) == (3600, 2, ["host", "disk"])
    assert taken.record() == {"hints": {**GOOD, "blend": {**GOOD["blend"], "segments": 1}}}


@pytest.mark.parametrize(
    "params", [None, 7, "x", {}, {"kvstrata": None}, {"do_remote_decode": True}]
)
def test_who_says_nothing_asks_for_nothing(params: Any) -> None:
    nothing = hints(params, HINTS)
    assert nothing == Hints()
    assert (nothing.load_limit, nothing.store_limit) == (NO_LIMIT, NO_LIMIT)
    assert (nothing.pin_s, nothing.priority, nothing.tiers, nothing.record()) == (0, 0, [], {})


@pytest.mark.parametrize(("name", "value", "why"), BAD)
def test_one_that_cannot_be_is_refused_and_the_others_count(
    name: str, value: Any, why: str
) -> None:
    taken = hints(sent({**GOOD, name: value}), HINTS)
    assert taken.given == {other: TAKEN[other] for other in GOOD if other != name}
    assert list(taken.refused) == [name]
    assert why in taken.refused[name]


def test_a_null_is_as_good_as_nothing() -> None:
    assert hints(sent(dict.fromkeys(HINTS)), HINTS) == Hints()


@pytest.mark.parametrize("name", HINTS)
def test_one_that_the_operator_does_not_list_is_refused(name: str) -> None:
    taken = hints(sent(GOOD), [other for other in HINTS if other != name])
    assert name not in taken.given
    assert taken.given.keys() == set(HINTS) - {name}
    assert taken.refused == {name: "not allowed here: see the operator's option hints"}


def test_clients_may_only_ask_for_less_unless_the_operator_says_so() -> None:
    allowed = load_config(environ={}).hints
    taken = hints(sent(GOOD), allowed)
    assert set(taken.given) == {"max_load_tokens", "max_store_tokens", "store", "load"}
    assert set(taken.refused) == {"session", "pin", "priority", "tiers", "blend"}
    assert load_config(environ={"KVSTRATA_HINTS": "all"}).hints == HINTS
    assert load_config(environ={}, overrides={"hints": ["pin"]}).hints == ("pin",)
    assert load_config(environ={}, overrides={"hints": "none"}).hints == ()


def test_neither_stored_nor_loaded_is_a_limit_of_none() -> None:
    taken = hints(sent({"store": False, "load": False, "max_load_tokens": 9}), HINTS)
    assert (taken.load_limit, taken.store_limit) == (0, 0)


def test_what_is_no_hint_is_told_by_name_a_few_times() -> None:
    taken = hints(sent({**dict.fromkeys("abcdefgh", 1), "store": False, "peer": "x"}), HINTS)
    assert taken.given == {"store": False}
    assert taken.refused == dict.fromkeys("abcd"[:MAX_UNKNOWN], "no such hint")
    assert hints(sent([1]), HINTS).refused == {"kvstrata": "not an object"}


def test_a_session_has_one_pin_and_other_prompts_have_their_own() -> None:
    one, other = (hints(sent({"session": name}), HINTS) for name in ("a" * 100, "b"))
    assert one.pin_name(bytes(32)) == one.pin_name(bytes([1] * 32)) == "session " + "a" * 100
    assert other.pin_name(bytes(32)) == "session b"
    names = {Hints().pin_name(bytes([number] * 32)) for number in range(3)}
    assert len(names) == 3
    assert all(name.startswith("prompt ") and len(name) < MAX_NAME_CHARS for name in names)
    assert len(one.pin_name(bytes(32))) < MAX_NAME_CHARS


def test_what_goes_to_peers_is_no_hint() -> None:
    assert hints(sent(dict.fromkeys(OF_PEERS, "x")), HINTS) == Hints()


def test_tiers_that_the_node_does_not_have_are_refused_together() -> None:
    taken = hints(sent(GOOD), HINTS)
    assert taken.on(["host", "disk", "redis"]) is taken
    left = taken.on(["host", "redis"])
    assert left.tiers == []
    assert left.given == {name: TAKEN[name] for name in GOOD if name != "tiers"}
    assert left.refused == {"tiers": "the node has no tier disk"}


def test_a_proxy_forwards_hints_and_names_the_peer_itself() -> None:
    told = {"do_remote_prefill": True, "kvstrata": {"peer": "a:1", "secret": "s"}}
    client = {"do_remote_decode": True, "kvstrata": {"pin": 60, "peer": "evil:1", "secret": "x"}}
    both = forwarded(told, client)
    assert both == {
        "do_remote_prefill": True,
        "kvstrata": {"pin": 60, "peer": "a:1", "secret": "s"},
    }
    for nothing in (None, 3, {}, {"kvstrata": 3}):
        assert forwarded(told, nothing) == told
    assert forwarded({"kvstrata": "?"}, client) == {"kvstrata": {"pin": 60}}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
some = st.dictionaries(st.sampled_from(HINTS) | st.text(), anything, max_size=20)


@settings(max_examples=400, deadline=None)
@given(ours=anything | some, allowed=st.sets(st.sampled_from(HINTS)))
@example(ours=dict.fromkeys(("\U0010ffff" * 100 + str(i) for i in range(100)), 1), allowed=set())
@example(ours={**GOOD, "session": "\U00010348" * 100, "tiers": ["\U00010348" * 32] * 16},
         allowed=set(HINTS))  # fmt: skip
def test_anything_is_taken_or_refused_by_name(ours: Any, allowed: set[str]) -> None:
    taken = hints(sent(ours), allowed)
    assert taken.given.keys() <= allowed
    assert not taken.given.keys() & taken.refused.keys()
    said = {name for name in HINTS if isinstance(ours, dict) and ours.get(name) is not None}
    assert said <= taken.given.keys() | taken.refused.keys()
    given = {name: ours[name] for name in taken.given}
    if "blend" in given:
        given["blend"] = asked(given["blend"])
    assert taken.given == given
    assert taken.load_limit >= 0
    assert taken.store_limit >= 0
    assert 0 <= taken.pin_s <= 7 * 86400
    assert taken.priority in PRIORITIES
    # A record can hold it, whatever it is, and everybody can read that.
    assert len(msgspec.msgpack.encode(taken.record())) < MAX_RECORD_BYTES * 3 // 4
    assert "\n" not in json.dumps(taken.record())
    assert all(why.isprintable() for why in taken.refused.values())
