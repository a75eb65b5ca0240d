"""One rank and two read each other's KV where they are told to share it (docs/sharing.md).

Two ranks add up in another order than one. In float32 that turns no token of these answers, so what
an engine says upon the other one's KV is what it says by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine.engine import request, whole_chunks
from tests.engine.place import Place
from tests.engine.plain import Texts

pytestmark = pytest.mark.engine

NEW = 6
LENGTHS = (129, 300, 700)
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 4096, "new_tokens": NEW}
TWO: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
}
SLICES = 2
"""The tiny Llama has two KV heads."""


def test_one_rank_and_two_read_each_other(tiny_llama: Path, texts: Texts) -> None:
    with Place(tiny_llama, {"share": "ranks"}) as place:
        one, two = place.engine(**OPTIONS), place.engine(**TWO, **OPTIONS)
        for writer, reader in ((one, two), (two, one)):
            prompts = texts.of(*LENGTHS)
            wrote = writer.answers(prompts)
            place.await_stored(writer, prompts, ranks=SLICES)
            # Nothing was ever stored under this salt.
            own = reader.answers([request(prompt, NEW, salt="its own") for prompt in prompts])
            assert {answer.cached for answer in (*wrote, *own)} == {0}
            assert [answer.tokens for answer in wrote] == [answer.tokens for answer in own]
            read = reader.answers(prompts)
            assert [answer.cached for answer in read] == [whole_chunks(len(p)) for p in prompts]
            assert [answer.tokens for answer in read] == [answer.tokens for answer in own]
            assert writer.keys(prompts[-1]) == reader.keys(prompts[-1])
        place.check()
        two.close()
        alone = place.engine(settings={"share": "none"}, **OPTIONS)
        assert {answer.cached for answer in alone.answers(prompts)} == {0}
        assert set(alone.keys(prompts[-1])).isdisjoint(one.keys(prompts[-1]))
        place.check()
