"""Every cause has a sentence of its own, and something to do."""

from __future__ import annotations

import re

import pytest

from kvstrata.config import OPTIONS
from kvstrata.observe.reasons import Unloaded, Why
from kvstrata.observe.sentences import sentence

#: what a person must read, by cause: whoever exchanges two causes' words fails here
SAID = {
    Why.EVICTED: (
        Unloaded(Why.EVICTED, 2, "disk", "", 90.0),
        "evicted from disk to make room 90 s",
    ),
    Why.CLEARED: (Unloaded(Why.CLEARED, 2, "host", "", 7200.0), "cleared from host memory 2 hours"),
    Why.CORRUPT: (Unloaded(Why.CORRUPT, 2, "disk"), "not those that had been stored"),
    Why.LOST: (Unloaded(Why.LOST, 2, "disk"), "disk did not have it any more"),
    Why.MOVED: (Unloaded(Why.MOVED, 2, "host"), "moved from host memory to another tier"),
    Why.NEVER: (Unloaded(Why.NEVER, 2), "nobody has stored it"),
    Why.ARRIVING: (Unloaded(Why.ARRIVING, 2), "being stored at that moment"),
    Why.NAMESPACE: (Unloaded(Why.NAMESPACE, 2, "", "adapter"), "stored under another adapter"),
    Why.ORDER: (Unloaded(Why.ORDER, 2, "disk"), "in disk in a byte order"),
    Why.TIER_OFF: (
        Unloaded(Why.TIER_OFF, 2, "redis", "no route"),
        "redis was not in use: no route",
    ),
    Why.DEADLINE: (Unloaded(Why.DEADLINE, 2, "", "match"), "node had not answered"),
    Why.CAPPED: (Unloaded(Why.CAPPED, 2, "", "leases"), "one client may hold still"),
    Why.PLANNED: (Unloaded(Why.PLANNED, 2), "reckoned to be faster"),
    Why.PARTIAL: (Unloaded(Why.PARTIAL, 2), "fills no chunk"),
    Why.LAST: (Unloaded(Why.LAST, 1), "computes at least one token"),
    Why.BYPASSED: (Unloaded(Why.BYPASSED, 2, "", "embeddings"), "went past the cache: embeddings"),
    Why.FAILED: (
        Unloaded(Why.FAILED, 2, "redis"),
        "found in redis, and then it could not be loaded",
    ),
    Why.NO_NODE: (Unloaded(Why.NO_NODE, 2), "had no node"),
    Why.ENGINE: (Unloaded(Why.ENGINE, 2), "engine did not take it"),
}


@pytest.mark.parametrize("why", Why, ids=lambda why: why.name)
def test_a_sentence(why: Why) -> None:
    reason, said = SAID[why]
    text, advice = sentence(reason)
    assert said in text
    assert text.startswith(f"{reason.tokens} token")
    assert advice
    assert not re.search(r"[{}]", text + advice)
    others = [sentence(other).text for name, (other, _) in SAID.items() if name is not why]
    assert not any(said in other for other in others)


def test_what_is_there_in_part() -> None:
    text, advice = sentence(Unloaded(Why.NEVER, 2, "host", "parts"))
    assert "not all that is needed" in text
    assert "stores what was missing" in advice
    assert "nobody has stored it" in sentence(Unloaded(Why.NEVER, 2, "host")).text


@pytest.mark.parametrize("part", ["salt", "tenant", "weights", "layout", "chunk_tokens", "reset"])
def test_which_part_differs(part: str) -> None:
    text = sentence(Unloaded(Why.NAMESPACE, 128, "", part)).text
    others = [sentence(Unloaded(Why.NAMESPACE, 128, "", other)).text
              for other in ("adapter", "unknown", "tensor_parallel", "dtype")]  # fmt: skip
    assert text not in others
    both = sentence(Unloaded(Why.NAMESPACE, 128, "", f"{part}, dtype")).text
    assert both.endswith("and another dtype.")


@pytest.mark.parametrize("detail", ["lookup", "load", "match"])
def test_whose_deadline(detail: str) -> None:
    said = {"lookup": "the match could wait", "load": "not brought in time", "match": "the request"}
    text = sentence(Unloaded(Why.DEADLINE, 128, "disk", detail)).text
    assert [name for name, words in said.items() if words in text] == [detail]


@pytest.mark.parametrize("detail", ["leases", "room", "message", "hints", "tiers"])
def test_which_cap(detail: str) -> None:
    said = {
        "leases": "hold still",
        "room": "no room",
        "message": "32,768",
        "hints": "no more was to be loaded",
        "tiers": "in disk, which the request left out",
    }
    text = sentence(Unloaded(Why.CAPPED, 128, "disk", detail)).text
    assert [name for name, words in said.items() if words in text] == [detail]


def test_options_that_are_named_exist() -> None:
    for reason, _ in SAID.values():
        for name in re.findall(r"\b(?:host|leases|disk|deadlines|peer)\.\w+", sentence(reason)[1]):
            assert name in OPTIONS, name


def test_an_earlier_clear_is_mentioned() -> None:
    assert "cleared 5 s before" in sentence(Unloaded(Why.NEVER, 128, ago_s=5.0)).text
