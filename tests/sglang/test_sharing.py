"""One cache for a real vLLM and a real SGLang: each loads what the other computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.engine.plain import Texts
from tests.sglang.children import PAGE, Answer, Server
from tests.sglang.place import Place, await_stored, pages
from tests.sglang.vllm_child import PYTHON, VLLM

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed beside SGLang")

LENGTHS = (300, 520, 700, 390, 450, 610, 330, 900)
TOKENS = 32
SHARE = {"share": "engines"}


class Both(NamedTuple):
    """A vLLM and an SGLang on one node."""

    place: Place
    vllm: VLLM
    sglang: Server


@pytest.fixture(scope="module")
def both(smollm2: Path) -> Iterator[Both]:
    with Place(smollm2, {**SHARE, "chunk_tokens": PAGE}) as place:
        vllm = VLLM(smollm2, place.folder / "vllm.log", place.settings)
        sglang = place.server()
        try:
            vllm.wait()
            sglang.wait()
            yield Both(place, vllm, sglang)
        finally:
            vllm.close()


@pytest.fixture(scope="module")
def alone(smollm2: Path, both: Both) -> Iterator[Both]:
    """Others on the same node, which share nothing."""
    off = {**both.place.settings, "share": "none"}
    vllm = VLLM(smollm2, both.place.folder / "alone.log", off)
    sglang = both.place.server(settings={"share": "none"})
    try:
        yield Both(both.place, vllm, sglang)
    finally:
        vllm.close()


def apart(ones: Sequence[Answer], others: Sequence[Answer]) -> float:
    """By how much the log-probabilities of the same tokens differ, on average.

    Up to where two answers part, which greedy ones do where two tokens are as likely.
    """
    differences = []
    for one, other in zip(ones, others, strict=True):
        for mine, theirs, a, b in zip(
            one.tokens, other.tokens, one.logprobs, other.logprobs, strict=True
        ):
            if mine != theirs:
                break
            differences.append(abs(a - b))
    assert len(differences) > len(ones), "they have little in common"
    return sum(differences) / len(differences)


def loaded_share(answers: Sequence[Answer], prompts: Sequence[Sequence[int]]) -> float:
    """Of the whole pages of these prompts, how many were loaded."""
    return sum(one.loaded for one in answers) / sum(pages(len(one)) for one in prompts)


def test_each_loads_what_the_other_computed(both: Both, texts: Texts) -> None:
    prompts = texts.of(*LENGTHS)
    whole = sum((len(prompt) + TOKENS - 1) // PAGE * PAGE for prompt in prompts)
    with await_stored(both.place.node, whole):
        of_vllm = both.vllm.answers(prompts, TOKENS)
    by_sglang = [both.sglang.ask(prompt, TOKENS) for prompt in prompts]
    # The other way round, with a salt: what is there already is nobody's who has it.
    with await_stored(both.place.node, whole):
        of_sglang = [both.sglang.ask(one, TOKENS, cache_salt="other") for one in prompts]
    by_vllm = both.vllm.answers(prompts, TOKENS, "other")
    assert {one.cached for one in (*of_vllm, *of_sglang)} == {0}
    assert loaded_share(by_sglang, prompts) >= 0.95
    assert loaded_share(by_vllm, prompts) >= 0.95
    cold = apart(of_vllm, of_sglang)
    print(f"cold {cold:.4f}, SGLang with vLLM's {apart(of_sglang, by_sglang):.4f}, vLLM with "
          f"SGLang's {apart(of_vllm, by_vllm):.4f}")  # fmt: skip
    assert cold > 0, "two engines that round alike show nothing"
    assert apart(of_sglang, by_sglang) <= 1.5 * cold
    assert apart(of_vllm, by_vllm) <= 1.5 * cold
    told = both.place.node.status()["requests"]
    assert {name for one in told for name in one["loaded_from"]} == {"vllm", "sglang"}
    assert "Traceback" not in both.sglang.said
    both.place.check()


def test_engines_that_are_not_told_to_never_meet(both: Both, alone: Both, texts: Texts) -> None:
    first, second = texts.of(*LENGTHS[:2]), texts.of(*LENGTHS[2:4])
    for prompts in (first, second):
        whole = sum(pages(len(prompt)) for prompt in prompts)
        with await_stored(both.place.node, whole):
            asked = alone.vllm.answers(prompts, 2)
        with await_stored(both.place.node, whole):
            asked += [alone.sglang.ask(prompt, 2) for prompt in prompts]
        assert {one.cached for one in asked} == {0}
        assert {one.cached for one in both.vllm.answers(prompts, 2)} == {0}
    for prompt in first:
        assert both.sglang.ask(prompt, 2).loaded == pages(len(prompt)), "of the vLLM that shares"
    both.place.check()
