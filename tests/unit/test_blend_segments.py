"""What a request names: strictly decoded, and cut at separators as a plain search would."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.blend import Rule
from kvstrata.blend.prompts import build
from kvstrata.blend.segments import MAX_SEGMENTS, asked, named, separated
from kvstrata.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "value",
    [
        {"segments": [[0, 20], [30, 90]]},
        {"separator": "\n\n# ", "plan": "edges"},
        {"segments": [[0, 20]], "plan": "deviation", "ratio": 0.3},
        {"segments": [[0, 20]], "plan": "deviation", "ratio": 0.3, "bound": 0.5},
        {"segments": [[0, 20]], "plan": "share"},
        {"segments": [[0, 20]], "quality": "kl <= 0.02"},
        {"segments": "auto", "plan": "edges"},
        {"segments": [[5, 5]]},  # refused where the prompt is known
    ],
)
def test_what_may_be_said(value: Any) -> None:
    said = asked(value)
    assert said.wants_more == ("plan" in value or "quality" in value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("edges", "Expected `object`"),
        ([1], "Expected `object`"),
        ({}, "either segments or separator"),
        ({"segments": [[0, 9]], "separator": "x"}, "either segments or separator"),
        ({"segments": []}, "length >= 1"),
        ({"segments": "all"}, "Invalid enum value"),
        ({"segments": [[0, 9]] * (MAX_SEGMENTS + 1)}, f"length <= {MAX_SEGMENTS}"),
        ({"segments": [[0]]}, "length 2"),
        ({"segments": [[-1, 9]]}, ">= 0"),
        ({"segments": [[0, 1 << 41]]}, "<="),
        ({"segments": [[0, True]]}, "Expected `int`"),
        ({"segments": [[0, 9.5]]}, "Expected `int`"),
        ({"segments": [[0, 9]], "plan": "cheap"}, "Invalid enum value"),
        ({"segments": [[0, 9]], "ratio": 0.5}, "a plan with ratio"),
        ({"segments": [[0, 9]], "plan": "edges", "ratio": 1.5}, "<= 1.0"),
        ({"segments": [[0, 9]], "plan": "edges", "ratio": float("nan")}, ">= 0.0"),
        ({"segments": [[0, 9]], "bound": 0.5}, "the plan deviation with bound"),
        ({"segments": [[0, 9]], "plan": "share", "bound": 0.5}, "the plan deviation with bound"),
        ({"segments": [[0, 9]], "quality": "kl <= 1", "bound": 1}, "the plan deviation with bound"),
        ({"segments": [[0, 9]], "plan": "deviation", "bound": 1.5}, "<= 1.0"),
        ({"segments": [[0, 9]], "plan": "deviation", "bound": "kl <= 1"}, "Expected `float"),
        ({"segments": [[0, 9]], "plan": "edges", "quality": "kl <= 1"}, "either plan or quality"),
        ({"segments": [[0, 9]], "quality": "k" * 129}, "length <= 128"),
        ({"separator": ""}, "length >= 1"),
        ({"separator": "x" * 257}, "length <= 256"),
        ({"segments": [[0, 9]], "more": 1}, "unknown field"),
    ],
)
def test_what_is_refused_says_why(value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        asked(value)


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({"plan": "edges"}, Rule("edges", 0.15)),
        ({"plan": "deviation", "ratio": 0.3}, Rule("deviation", 0.3)),
        # What says itself how many is cut off where a ratio says so, and nowhere else.
        ({"plan": "deviation", "bound": 0.4}, Rule("deviation", 1.0, 0.4)),
        ({"plan": "deviation", "bound": 0.4, "ratio": 0.2}, Rule("deviation", 0.2, 0.4)),
        ({"plan": "share"}, Rule("share", 1.0)),
        ({"plan": "share", "ratio": 0.1}, Rule("share", 0.1)),
    ],
)
def test_what_a_plan_goes_by_where_it_does_not_say(more: dict[str, Any], rule: Rule) -> None:
    assert asked({"segments": "auto", **more}).rule == rule


def test_a_record_is_short_whatever_was_said() -> None:
    many = asked({"segments": [[9 * i, 9 * i + 5] for i in range(100)], "plan": "none"})
    assert many.shown() == {"segments": 100, "plan": "none"}
    assert asked({"separator": "\n\x1b[2J"}).shown() == {"separator": r"\n\x1b[2J"}


def test_listed_segments_are_put_in_order() -> None:
    assert named([(30, 40), (0, 20), (20, 30)], 40) == [range(20), range(20, 30), range(30, 40)]


@pytest.mark.parametrize("segments", [[(0, 41)], [(5, 5)], [(9, 5)], [(0, 10), (9, 20)]])
def test_listed_segments_that_cannot_be_are_refused(segments: list[tuple[int, int]]) -> None:
    with pytest.raises(UsageError):
        named(segments, 40)


tokens = st.lists(st.integers(0, 2), max_size=40)


@given(tokens, st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_separated_is_what_splitting_a_text_gives(prompt: list[int], separator: list[int]) -> None:
    parts = "".join(map(str, prompt)).split("".join(map(str, separator)))
    found = ["".join(str(prompt[i]) for i in one) for one in separated(prompt, separator)]
    assert found == [part for part in parts[:-1] if part]


def test_too_many_separators_are_refused() -> None:
    assert len(separated([1, 0] * MAX_SEGMENTS, [0])) == MAX_SEGMENTS
    with pytest.raises(UsageError):
        separated([1, 0] * (MAX_SEGMENTS + 1), [0])
    with pytest.raises(UsageError):
        separated([1, 0], [])


class Letters:
    """A tokenizer of letters, that begins a text with 1 and merges two stars."""

    bos_token_id = 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + [ord(one) for one in text.replace("**", "§")]


def test_the_page_shows_what_comes_out() -> None:
    failed, count = doctest.testfile(str(ROOT / "docs/blend.md"), module_relative=False)
    assert (failed, count) == (0, 4)


def test_a_built_prompt_names_its_texts_where_they_are() -> None:
    texts = ["Answer briefly. ", "first *" + "a" * 30, "* second" + "b" * 30, "no", "Which?"]
    ids, params = build(Letters(), texts, plan="edges", ratio=0.2)
    blend = params["kvstrata"]["blend"]
    assert asked(blend).ratio == 0.2
    assert ids[0] == 1
    found = ["".join(map(chr, ids[start:stop])) for start, stop in blend["segments"]]
    assert found == texts[:3]
    assert "".join(map(chr, ids[1:])) == "".join(texts)  # the two stars are not merged
    (_, params) = build(Letters(), texts, plan="deviation", bound=0.4)
    assert asked(params["kvstrata"]["blend"]).bound == 0.4
    assert build(Letters(), ["Which?"])[1] == {}
    assert build(Letters(), ["a" * 20, "?"], start=[])[1]["kvstrata"]["blend"]["segments"] == [
        [0, 20]
    ]
    with pytest.raises(UsageError):
        build(Letters(), [])
