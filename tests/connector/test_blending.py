"""Blends in vLLM's own scheduler: what is found and put together, and that nobody else has it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.connector.blend_rig import BlendRig
from tests.connector.fake_model import BLOCK, CHUNK
from tests.connector.rig import prompt
from tests.connector.test_hints import say

Make = Callable[..., BlendRig]

HEAD = prompt(40, seed=90)
A, B, C = (prompt(110 + 7 * i, seed=50 + i) for i in range(3))
QUESTION = prompt(21, seed=91)


@pytest.fixture
def make_blends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made: list[BlendRig] = []

    def make(**options: Any) -> BlendRig:
        made.append(BlendRig(tmp_path / f"rig{len(made)}", **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


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
    rig.side.blending._signing._threads.submit(lambda: None).result()  # type: ignore[union-attr]
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
        plan = chance.choice([None, "edges", "deviation", "random", "none", "all"])
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
