"""Blends in vLLM's own scheduler: what is found and put together, and that nobody else has it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.connector.blend_rig import BlendRig
from tests.connector.fake_model import BLOCK, CHUNK
from tests.connector.gates import GatedTier, tiered
from tests.connector.rig import prompt
from tests.connector.test_hints import say
from tests.support.subscribers import Subscriber
from vllm.distributed.kv_events import BlockRemoved

from kvstrata.blend import Rule, stretches
from kvstrata.blend.signposts import PART, Signposts
from kvstrata.connectors.vllm import finding
from kvstrata.keys import KeyChain

Make = Callable[..., BlendRig]

HEAD = prompt(40, seed=90)
A, B, C = (prompt(110 + 7 * i, seed=50 + i) for i in range(3))
QUESTION = prompt(21, seed=91)


def joined(*texts: list[int], question: list[int] = QUESTION) -> tuple[list[int], list[list[int]]]:
    """A prompt of a head, texts and a question, and where the texts are."""
    tokens, segments = list(HEAD), []
    for text in texts:
        segments.append([len(tokens), len(tokens) + len(text)])
        tokens += text
    return tokens + question, segments


def blend(segments: list[list[int]], plan: str | None = "edges", **more: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"segments": segments, **more}
    if plan is not None:
        said["plan"] = plan
    return {"blend": said}


def warm(rig: BlendRig, *texts: list[int]) -> None:
    """Have these texts computed one behind the other, and named."""
    tokens, segments = joined(*texts)
    rig.ask(tokens, 30, **say(blend(segments, None), 30))
    rig.settle()
    rig.reset()


def last(rig: BlendRig) -> dict[str, Any]:
    record: dict[str, Any] = rig.settle()["requests"][-1]
    return record


def test_texts_are_found_in_another_order(make_blends: Make) -> None:
    rig = make_blends()
    warm(rig, A, B, C)
    tokens, segments = joined(C, A, B)
    rig.ask(tokens, 3, **say(blend(segments, ratio=0.25), 3))
    (told,) = rig.blends
    # The head is exact, and what vLLM has of it is none; the texts are there, but for what lies in
    # the block with the last token.
    assert (told.start, told.first) == (0, len(HEAD))
    assert len(told.tokens) == (len(tokens) - 1) // BLOCK * BLOCK
    exact = [piece for piece in told.pieces if piece.position < told.first]
    assert sum(piece.count for piece in exact) == len(HEAD) // CHUNK * CHUNK
    reused = sum(piece.count for piece in told.pieces) - sum(piece.count for piece in exact)
    assert reused == len(A) + len(B) + len(C)
    assert (told.plan, told.ratio) == ("edges", 0.25)
    record = last(rig)
    assert record["blended_tokens"] == reused
    assert record["loaded_tokens"] == reused + CHUNK
    assert record["blend_plan"] == "edges 0.25"
    assert record["blend_miss"] == ""
    assert record["recomputed_tokens"] == len(told.tokens) - record["loaded_tokens"] + round(
        0.25 * reused
    )
    assert record["hints"] == {"blend": {"segments": 3, "plan": "edges", "ratio": 0.25}}
    rig.check()


def test_a_prompt_that_is_there_as_it_is_is_loaded_and_not_blended(make_blends: Make) -> None:
    rig = make_blends()
    warm(rig, A, B, C)
    tokens, segments = joined(A, B, C)
    assert rig.ask(tokens, **say(blend(segments))) == len(tokens) // CHUNK * CHUNK
    assert rig.blends == []
    assert last(rig)["blend_miss"] == "none of its texts was found"
    rig.check()


def test_what_is_exact_behind_the_head_is_stored_and_what_is_not_is_not(make_blends: Make) -> None:
    rig = make_blends()
    warm(rig, A, B)
    tokens, segments = joined(C, B, A)  # C is new, and stands where it is exact
    rig.ask(tokens, 40, **say(blend(segments), 40))
    rig.settle()
    rig.reset()
    exact = (len(HEAD) + len(C)) // CHUNK * CHUNK
    assert rig.ask(tokens) == exact
    rig.settle()
    rig.reset()
    # So C has a signpost now.
    other, places = joined(A, C)
    rig.ask(other, **say(blend(places)))
    assert rig.blends[-1].first == len(HEAD) + len(A)
    assert sum(p.count for p in rig.blends[-1].pieces if p.position >= rig.blends[-1].first) >= (
        len(C) - CHUNK
    )
    rig.check()


def test_vllms_own_blocks_of_a_blend_are_nobodys(make_blends: Make) -> None:
    rig = make_blends(num_blocks=200)
    warm(rig, A, B, C)
    tokens, segments = joined(C, A, B)
    name = rig.add(tokens, 50, **say(blend(segments), 50))
    rig.run()
    answer = rig.answers[name]
    # The same prompt with all that was answered, without a word of blending.
    again = rig.add(tokens + answer, 5)
    rig.run()
    assert rig.first.keys() == {name}
    assert len(rig.answers[again]) == 5
    rig.check()


@pytest.mark.parametrize("salt", ["bob", None])
def test_nobody_finds_the_texts_of_another_salt(make_blends: Make, salt: str | None) -> None:
    rig = make_blends()
    tokens, segments = joined(A, B)
    rig.ask(tokens, 30, cache_salt="alice", **say(blend(segments, None), 30))
    rig.settle()
    rig.reset()
    tokens, segments = joined(B, A)
    rig.ask(tokens, cache_salt=salt, **say(blend(segments)))
    assert rig.blends == []
    rig.reset()
    rig.ask(tokens, cache_salt="alice", **say(blend(segments)))
    assert len(rig.blends) == 1
    rig.check()


def test_what_a_slow_tier_has_is_brought(make_blends: Make) -> None:
    tier = GatedTier()
    rig = make_blends(make_node=tiered(tier), extra={"deadlines.match": "20ms"})
    warm(rig, A, B, C)
    rig.drop_host()
    tier.opened.clear()
    tokens, segments = joined(C, B, A)
    rig.add(tokens, **say(blend(segments)))
    for _ in range(5):
        rig.step()
    assert rig.blends == []  # the signposts have not come
    tier.opened.set()
    rig.run()
    (told,) = rig.blends
    assert sum(piece.count for piece in told.pieces) > len(A) + len(B) + len(C)
    record = last(rig)
    # Part of it may be there by then, brought for this very request.
    assert record["tier_tokens"].keys() in ({tier.name}, {tier.name, "host"})
    assert sum(record["tier_tokens"].values()) == record["loaded_tokens"]
    rig.check()


def test_a_blend_that_fails_is_computed_and_stays_apart(make_blends: Make) -> None:
    rig = make_blends()
    warm(rig, A, B, C)
    rig.fails = lambda: True
    tokens, segments = joined(C, A, B)
    rig.ask(tokens, 40, **say(blend(segments), 40))
    record = last(rig)
    assert (record["blended_tokens"], record["recomputed_tokens"]) == (0, 0)
    assert record["blend_miss"] == "the load failed"
    assert record["loaded_tokens"] == 0
    rig.check()


def test_an_abort_while_it_is_under_way_holds_nothing_for_long(make_blends: Make) -> None:
    rig = make_blends()
    warm(rig, A, B, C)
    rig.takes = lambda: 5
    tokens, segments = joined(C, A, B)
    name = rig.add(tokens, **say(blend(segments)))
    rig.until(lambda: rig.step() is not None and rig.blends != [])
    rig.abort(name)
    assert rig.num_leases() >= 3
    rig.run()
    rig.check()


def test_a_request_that_is_aborted_while_it_looks_holds_nothing(make_blends: Make) -> None:
    tier = GatedTier()
    rig = make_blends(make_node=tiered(tier), extra={"deadlines.match": "20ms"})
    warm(rig, A, B)
    rig.drop_host()
    tier.opened.clear()
    tokens, segments = joined(B, A)
    name = rig.add(tokens, **say(blend(segments)))
    rig.step()
    rig.abort(name)
    rig.step()
    tier.opened.set()
    rig.check()


def test_a_node_that_dies_while_it_is_asked_is_done_without(make_blends: Make) -> None:
    tier = GatedTier()
    rig = make_blends(make_node=tiered(tier), extra={"deadlines.match": "20ms"})
    warm(rig, A, B)
    rig.drop_host()
    tier.opened.clear()
    tokens, segments = joined(B, A)
    name = rig.add(tokens, 2, **say(blend(segments), 2))
    rig.step()
    tier.opened.set()
    rig.stop_node()
    rig.run()
    assert len(rig.answers[name]) == 2
    assert rig.blends == []
    assert rig.wrong() == []


def test_preempted_it_begins_anew_and_finds_nothing_but_what_is_exact(make_blends: Make) -> None:
    rig = make_blends(num_blocks=56)
    warm(rig, A, B, C)
    tokens, segments = joined(C, A, B)
    names = [rig.add(tokens, 200, **say(blend(segments), 200)) for _ in range(3)]
    counts = []
    preempt = rig.scheduler._preempt_request

    def preempted(request: Any, *arguments: Any, **options: Any) -> None:
        counts.append(request.request_id)
        preempt(request, *arguments, **options)

    rig.scheduler._preempt_request = preempted
    rig.run()
    assert counts, "nobody was preempted"
    assert len(rig.blends) == 3, "once each"
    assert [len(rig.answers[name]) for name in names] == [200, 200, 200]
    rig.ask(tokens)
    rig.check()


def test_a_signpost_to_what_has_gone_makes_room_for_another(
    make_blends: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_blends()
    warm(rig, A, B)
    client = rig.side._lookups.client
    assert client is not None
    parts = rig.side._lookups.namespaces.parts_of(rig.request(A))
    assert parts is not None
    post = Signposts(client.hello.secret, parts.digest(), CHUNK).key(B)
    # What it names has gone, but it is young: its chunks may be on their way.
    chain = KeyChain(client.hello.secret, parts.digest(), CHUNK)
    client.clear(chain.keys(joined(A, B)[0]))
    tokens, segments = joined(C, B)
    rig.ask(tokens, **say({**blend(segments), "store": False}))
    assert rig.blends == []
    assert client.lookup([post], [PART])[0] != 255
    monkeypatch.setattr(finding, "STALE_S", 0.0)
    rig.reset()
    rig.ask(tokens, 30, **say(blend(segments), 30))
    assert rig.blends == []
    rig.settle()
    rig.reset()
    # It was computed exactly there, and signed anew.
    tokens, segments = joined(B, C)
    rig.ask(tokens, **say(blend(segments)))
    (told,) = rig.blends
    assert sum(piece.count for piece in told.pieces) >= len(B) + len(C)
    rig.check()


def test_texts_end_at_a_separator_of_the_engines_own_tokenizer(make_blends: Make) -> None:
    rig = make_blends()
    separator = rig.side.blending._texts.separator("\n\n###\n\n")
    assert len(separator) > 1

    def texts(*some: list[int]) -> list[int]:
        return [token for one in some for token in (*one, *separator)] + QUESTION

    said = {"separator": "\n\n###\n\n"}
    rig.ask(texts(HEAD, A, B), 30, **say({"blend": said}, 30))
    rig.settle()
    rig.reset()
    rig.ask(texts(HEAD, B, A), **say({"blend": {**said, "plan": "none"}}))
    (told,) = rig.blends
    assert told.first == len(HEAD) + len(separator)
    reused = [p for p in told.pieces if p.position >= told.first]
    assert sum(piece.count for piece in reused) == len(A) + len(B)
    rig.check()


def test_behind_an_edit_a_file_is_turned_and_not_computed(make_blends: Make) -> None:
    rig = make_blends(num_blocks=200)
    chance = random.Random(5)
    file = [chance.randrange(5000) for _ in range(1500)]
    edited = [*file[:400], 4, 5, 6, *file[410:]]
    said = {"blend": {"segments": "auto"}}
    rig.ask(file + QUESTION, 40, **say(said, 40))
    rig.settle()
    rig.reset()
    rig.ask(edited + QUESTION, 3, **say({"blend": {**said["blend"], "plan": "edges"}}, 3))
    (told,) = rig.blends
    assert 400 < told.first < 1000
    behind = [piece for piece in told.pieces if piece.position >= told.first]
    assert {piece.position - piece.was for piece in behind} == {-7}
    # All of it is one text, though it was found in pieces.
    places = [(piece.position, piece.was, piece.count) for piece in behind]
    (stretch,) = stretches(places, told.first)
    assert len(stretch) == sum(piece.count for piece in behind) > 300
    assert last(rig)["hints"]["blend"] == {"segments": "auto", "plan": "edges"}
    rig.check()


@pytest.mark.parametrize(
    ("more", "rule", "shown"),
    [
        ({"plan": "share"}, Rule("share", 1.0), "share 1"),
        ({"plan": "deviation", "bound": 0.25}, Rule("deviation", 1.0, 0.25),
         "deviation 1 bound 0.25"),
        ({"plan": "deviation", "bound": 0.25, "ratio": 0.1}, Rule("deviation", 0.1, 0.25),
         "deviation 0.1 bound 0.25"),
    ],
)  # fmt: skip
def test_how_many_a_bound_takes_is_the_workers_to_find_out(
    make_blends: Make, more: dict[str, Any], rule: Rule, shown: str
) -> None:
    rig = make_blends()
    warm(rig, A, B)
    tokens, segments = joined(B, A)
    rig.ask(tokens, **say({"blend": {"segments": segments, **more}}))
    (told,) = rig.blends
    assert (told.plan, told.ratio, told.bound) == rule
    record = last(rig)
    assert record["blend_plan"] == shown
    assert record["hints"]["blend"] == {"segments": 2, **more}
    rig.check()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"plan": "edges", "bound": 0.5}, "the plan deviation with bound"),
        ({"plan": "deviation", "bound": 2}, "<= 1.0"),
        ({"plan": "shared"}, "Invalid enum value"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_in_words(
    make_blends: Make, wrong: dict[str, Any], why: str
) -> None:
    rig = make_blends()
    warm(rig, A, B)
    tokens, segments = joined(B, A)
    rig.ask(tokens, **say({"blend": {"segments": segments, **wrong}}))
    assert rig.blends == []
    assert why in last(rig)["hints_refused"]["blend"]
    rig.check()


PICKED = Rule("deviation", 1.0, 0.3)


def test_a_bound_picks_the_plan_from_the_models_table(
    make_blends: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def pick(weights: str, bound: object) -> Rule | str:
        asked.append((weights, str(bound)))
        return PICKED if str(bound) == "kl <= 0.02" else "nothing keeps it"

    monkeypatch.setattr("kvstrata.connectors.vllm.blending.pick_blend", pick)
    rig = make_blends()
    warm(rig, A, B)
    tokens, segments = joined(B, A)
    bound = {"segments": segments, "quality": "kl <= 0.001"}
    rig.ask(tokens, **say({"blend": bound}))
    assert rig.blends == []
    assert last(rig)["blend_miss"] == "nothing keeps it"
    rig.reset()
    tokens, segments = joined(C, B, A)
    bound["segments"] = segments
    rig.ask(tokens, **say({"blend": {**bound, "quality": "kl <= 0.02"}}))
    (told,) = rig.blends
    assert (told.plan, told.ratio, told.bound) == PICKED
    assert last(rig)["blend_plan"] == "deviation 1 bound 0.3"
    assert {len(weights) for weights, _ in asked} == {64}
    rig.reset()
    rig.ask([*tokens, 4], **say({"blend": {**bound, "quality": "kl < 1"}}))
    assert "is not a metric" in last(rig)["hints_refused"]["blend"]
    rig.check()


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"blend": "off"}, {}, "see the operator's option blend"),
    ({"hints": "store"}, {}, "see the operator's option hints"),
    ({}, {"resumable": True}, "sessions are not blended"),
]


@pytest.mark.parametrize(("extra", "options", "why"), REFUSED)
def test_what_is_refused_is_served_exactly(
    make_blends: Make, extra: dict[str, Any], options: dict[str, Any], why: str
) -> None:
    rig = make_blends(extra=extra)
    warm_without = joined(A, B)[0]
    rig.ask(warm_without, 30)
    rig.settle()
    rig.reset()
    tokens, segments = joined(A, B)
    if options:
        name = rig.add(tokens, **say(blend(segments)), **options)
        rig.until(lambda: bool(rig.step()) and rig.answers[name] != [])
        rig.abort(name)
        rig.run()
    else:
        rig.ask(tokens, **say(blend(segments)))
    assert why in last(rig)["hints_refused"]["blend"]
    assert rig.blends == []
    assert rig.wrong() == []


@pytest.mark.parametrize(
    ("segments", "why"),
    [([[0, 5000]], "is no part of a prompt"), ([[0, 40], [30, 60]], "lies over another")],
)
def test_segments_that_cannot_be_are_refused_in_words(
    make_blends: Make, segments: list[list[int]], why: str
) -> None:
    rig = make_blends()
    rig.ask(joined(A)[0], **say(blend(segments)))
    assert why in last(rig)["hints_refused"]["blend"]
    rig.check()


def test_before_the_engine_has_shown_that_it_can_nothing_is_blended(make_blends: Make) -> None:
    rig = make_blends()
    warm(rig, A, B)
    rig.side.blending.proven = False
    tokens, segments = joined(B, A)
    rig.ask(tokens, **say(blend(segments)))
    assert "has not shown yet" in last(rig)["blend_miss"]
    rig.side.blending.hear("", "layer 3 is turned wrongly")
    rig.ask(tokens, **say(blend(segments)))
    assert "layer 3" in last(rig)["hints_refused"]["blend"]
    assert rig.blends == []
    rig.check()


def test_what_vllm_publishes_of_a_blend_it_takes_back(make_blends: Make, tmp_path: Path) -> None:
    router = Subscriber(tmp_path)
    rig = make_blends(events=router.config)
    warm(rig, A, B)
    tokens, segments = joined(B, A)
    rig.ask(tokens, 60, **say(blend(segments), 60))
    rig.step()
    (told,) = rig.blends
    exact = told.first // BLOCK
    assert any(isinstance(one, BlockRemoved) for one in router.events("GPU"))
    known = sorted(router.known("GPU").values())
    assert known == sorted(tokens[i * BLOCK : (i + 1) * BLOCK] for i in range(exact))
    rig.check()
    router.close()


@pytest.mark.parametrize("seed", range(3))
def test_mixed_requests_poison_nobody(make_blends: Make, seed: int) -> None:
    chance = random.Random(seed)
    rig = make_blends(
        num_blocks=100, pipelined=seed == 2, extra={"inside": "on", "host.capacity": "2MiB"}
    )
    rig.takes = lambda: chance.randint(1, 4)
    rig.fails = lambda: chance.random() < 0.05
    texts = [prompt(chance.randint(20, 140), seed=30 + i) for i in range(6)]
    heads = [prompt(length, seed=80 + i) for i, length in enumerate((0, 17, 64))]
    waiting: list[str] = []
    for _ in range(120):
        tokens, segments = list(chance.choice(heads)), []
        for text in chance.sample(texts, chance.randint(1, 4)):
            segments.append([len(tokens), len(tokens) + len(text)])
            tokens += text
        tokens += prompt(chance.randint(1, 40), seed=chance.randint(0, 9))
        count = chance.randint(1, 40)
        plan = chance.choice(
            [None, "anchors", "edges", "deviation", "share", "random", "none", "all"]
        )
        salt = chance.choice(["", "", "", "alice"])
        exact = chance.random() < 0.4
        options: dict[str, Any] = {} if exact else say(blend(segments, plan), count)
        waiting.append(rig.add(tokens, count, cache_salt=salt or None, **options))
        for _ in range(chance.randint(0, 6)):
            rig.step()
            # What is answered may be asked for by somebody else.
            for name in waiting:
                rig.note(name) if name in rig.scheduler.requests and name not in rig.first else None
        if chance.random() < 0.05 and (
            running := [n for n in waiting if n in rig.scheduler.requests]
        ):
            rig.abort(chance.choice(running))
        if chance.random() < 0.03 and not rig.scheduler.has_requests():
            rig.reset()
    rig.run()
    assert len(rig.first) > 12, "hardly anything was blended"
    blended = [rig.tokens[name] for name in rig.first]
    # Everything that was blended once is asked for exactly, from vLLM's cache and from the node.
    for forget in (False, True):
        if forget:
            rig.settle()
            rig.reset()
        for tokens in blended:
            rig.ask(tokens[:1500])
    rig.check()
