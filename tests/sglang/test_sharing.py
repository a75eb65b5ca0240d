"""One cache for a real vLLM and a real SGLang: each loads what the other computed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.engine.plain import Texts
from tests.sglang.children import PAGE, Answer, Server
from tests.sglang.place import ADMIN, Place, await_stored, pages
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
        sglang = place.server(ADMIN)
        try:
            vllm.wait()
            sglang.wait()
            yield Both(place, vllm, sglang)
        finally:
            vllm.close()


@pytest.fixture
def alone(smollm2: Path, both: Both) -> Iterator[VLLM]:
    """Another vLLM on the same node, which shares nothing."""
    off = {**both.place.settings, "share": "none"}
    with closing(VLLM(smollm2, both.place.folder / "alone.log", off)) as vllm:
        yield vllm


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
    by_sglang = both.sglang.ask_all(prompts, TOKENS)
    # The other way round, with a salt: what is there already is nobody's who has it.
    with await_stored(both.place.node, whole):
        of_sglang = both.sglang.ask_all(prompts, TOKENS, cache_salt=["other"] * len(prompts))
    by_vllm = both.vllm.answers(prompts, TOKENS, "other")
    assert {one.cached for one in (*of_vllm, *of_sglang)} == {0}
    assert loaded_share(by_sglang, prompts) >= 0.95
    assert loaded_share(by_vllm, prompts) >= 0.95
    cold = apart(of_vllm, of_sglang)
    assert cold > 0, "two engines that round alike show nothing"
    assert apart(of_sglang, by_sglang) <= 1.5 * cold
    assert apart(of_vllm, by_vllm) <= 1.5 * cold
    told = both.place.node.status()["requests"]
    assert {name for one in told for name in one["loaded_from"]} == {"vllm", "sglang"}
    assert "Traceback" not in both.sglang.said
    both.place.check()


def test_each_goes_on_with_what_the_other_began(both: Both, texts: Texts) -> None:
    (document,) = texts.of(1000)
    (cold,) = both.vllm.answers([document], 8, "once")
    with await_stored(both.place.node, 3 * PAGE):
        both.vllm.answers([document[:400]], 1)
    with await_stored(both.place.node, 4 * PAGE):
        assert both.sglang.ask(document[:930], 1).loaded == 3 * PAGE
    (asked,) = both.vllm.answers([document], 8)
    assert asked.loaded == 7 * PAGE
    assert asked.tokens[0] == cold.tokens[0]
    told = both.place.node.status()["requests"][-1]
    assert told["loaded_from"] == {"vllm": 3 * PAGE, "sglang": 4 * PAGE}
    said = explained(both.place, told["request"])
    assert said.endswith("896 loaded (computed: 384 by vllm, 512 by sglang)")


def explained(place: Place, request: str) -> str:
    """The first line of what ``kvstrata explain`` says of a request."""
    command = [sys.executable, "-m", "kvstrata.cli", "explain", request]
    told = subprocess.run(
        [*command, "--set", f"node={place.settings['node']}"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return told.stdout.splitlines()[0]


def test_engines_that_are_not_told_to_never_meet(both: Both, alone: VLLM, texts: Texts) -> None:
    ones, others = texts.of(300, 520), texts.of(300, 520)
    whole = sum(pages(len(prompt)) for prompt in ones)

    def of_vllm(vllm: VLLM, prompts: list[list[int]], hits: int) -> None:
        with await_stored(both.place.node, 0 if hits else whole):
            assert sum(one.loaded for one in vllm.answers(prompts, 2)) == hits

    def of_sglang(share: str, prompts: list[list[int]], hits: int) -> None:
        both.place.detach(both.sglang)
        both.place.attach(both.sglang, {"share": share})
        both.sglang.flush()
        with await_stored(both.place.node, 0 if hits else whole):
            assert sum(one.loaded for one in both.sglang.ask_all(prompts, 2)) == hits

    of_vllm(alone, ones, 0)
    of_sglang("none", ones, 0)
    of_vllm(both.vllm, ones, 0)
    of_sglang("engines", ones, whole)  # of the vLLM that shares
    of_sglang("none", others, 0)
    of_vllm(alone, others, 0)
    of_sglang("engines", others, 0)
    of_vllm(both.vllm, others, whole)
    assert "Traceback" not in both.sglang.said
    both.place.check()
