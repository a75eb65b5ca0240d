"""Recurrent states where prompts part: a step ends there, and the next prompt goes on there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine.engine import CHUNK, Engine, Prompt, whole_chunks
from tests.engine.kinds import KINDS, NEW
from tests.engine.place import Place, eventually
from tests.engine.plain import Texts

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

STRIDE = 512
SHARED = 700


@pytest.fixture(scope="module")
def folder() -> Path:
    return KINDS["tiny_qwen3_next"].folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def await_state(place: Place, engine: Engine, prompt: Prompt, at: int) -> None:
    """Return once the attention of a prompt is stored, and all states after so many tokens."""
    (told,) = place.node.status()["namespaces"]
    of_state = [part for part, need in zip(told["objects"], told["needs"], strict=True) if need]
    every = [part for part in told["objects"] if part not in of_state]
    keys = engine.keys(prompt)
    eventually(lambda: 255 not in place.node.lookup(keys, every), "attention stored")
    eventually(
        lambda: 255 not in place.node.lookup([keys[at // CHUNK - 1]], of_state),
        f"states after {at} tokens stored",
    )


def test_the_third_prompt_goes_on_where_the_second_parted(folder: Path, texts: Texts) -> None:
    """Between two strides, for an engine that has forgotten, as for one that has not."""
    first, others, more = texts.of(1100, 300, 200)
    asked = [first, [*first[:SHARED], *others], [*first[:SHARED], *more]]
    with Place(folder) as place:
        kind = KINDS["tiny_qwen3_next"]
        engine = place.engine(**kind.engine(max_num_batched_tokens=STRIDE))
        engine.wait()
        engine.call("detach")
        plain = engine.answers(asked)
        assert plain[2].cached == whole_chunks(SHARED), "as vLLM's own cache has it"
        engine.forget()
        engine.call("attach")
        cached = []
        for prompt, one, kept in zip(asked, plain, (STRIDE, 640, 640), strict=True):
            answer = engine.answer(prompt)
            assert answer.tokens == one.tokens
            cached.append(answer.cached)
            assert place.last_record(len(prompt) + NEW)["loaded_tokens"] == answer.cached
            await_state(place, engine, prompt, kept)
            engine.forget()
        assert cached == [0, STRIDE, whole_chunks(SHARED)]
        place.check()
