"""A hit never changes an answer of a real model: cold, warm from host memory, and from disk."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.engine.engine import CHUNK, Answer, Engine, Prompt, whole_chunks
from tests.engine.place import Place, known_tokens
from tests.engine.plain import LENGTHS, Plain, Texts
from tests.engine.shared import Engines

from kvstrata.testing import models

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

NEW = 16
DEAR = (641, 769, 900, 1500)
"""Lengths that only a tiny model is asked for."""


@dataclass
class Story:
    """One engine, its node, what it was asked cold and what it answered."""

    place: Place
    engine: Engine
    prompts: list[Prompt]
    cold: list[Answer]

    def restart(self) -> None:
        """End engine and node, and start both again over the same disk."""
        self.place.flush()
        self.place.end()
        # Every process derives the same keys, whatever the seed of Python's own hashes.
        self.engine = self.place.engine(fresh=True, new_tokens=NEW)
        self.place.await_ready(self.engine)


@pytest.fixture(scope="module")
def plain(engines: Engines, smollm2: Path) -> Plain:
    """Plain vLLM with the real model."""
    return engines.plain(smollm2, new_tokens=NEW)


@pytest.fixture(scope="module")
def story(smollm2: Path, tokenizer: models.Tokenizer, plain: Plain) -> Iterator[Story]:
    prompts = Texts(tokenizer, "story").of(*(n for n in LENGTHS if n not in DEAR))
    # A node that was just started compiles its codec with the first load from disk, and a busy
    # machine takes long for that. A load that ends early is computed to its end, otherwise rounded.
    patient = {"deadlines.load": "60s"}
    with Place(smollm2, patient) as place, ThreadPoolExecutor(1) as aside:
        # Plain vLLM computes on the other core meanwhile.
        reference = aside.submit(plain.cold, prompts)
        place.use_disk()
        engine = place.engine(new_tokens=NEW)
        cold = engine.answers(prompts)
        place.await_stored(
            engine, [known_tokens(*pair) for pair in zip(prompts, cold, strict=True)]
        )
        reference.result()
        yield Story(place, engine, prompts, cold)


def check_warm(story: Story, plain: Plain, tier: str) -> None:
    """All prompts again: whole chunks hit in the named tier, answers as plain vLLM upon its hit."""
    place, engine = story.place, story.engine
    hits = place.count(f'hit_chunks_total{{tier="{tier}"}}')
    engine.forget()
    warm = engine.answers(story.prompts)
    assert [answer.cached for answer in warm] == [whole_chunks(len(p)) for p in story.prompts]
    num_chunks = sum(len(prompt) // CHUNK for prompt in story.prompts)
    assert place.count(f'hit_chunks_total{{tier="{tier}"}}') - hits == num_chunks
    place.last_record(len(story.prompts[-1]) + NEW)
    records = {one["prompt_tokens"]: one for one in place.node.status()["requests"]}
    early = [one for length, one in records.items() if one["loaded_tokens"] < whole_chunks(length)]
    assert early == [], "not all of it was loaded"
    assert [answer.tokens for answer in warm] == plain.warm(story.prompts)
    place.check()


def test_cold(story: Story, plain: Plain) -> None:
    assert len(story.prompts) >= 30
    assert {answer.cached for answer in story.cold} == {0}
    assert [answer.tokens for answer in story.cold] == plain.cold(story.prompts)
    assert {len(answer.tokens) for answer in story.cold} == {NEW}
    story.place.check()


def test_warm_from_host(story: Story, plain: Plain) -> None:
    check_warm(story, plain, "host")


def test_loaded_bytes_are_plain_vllm_s(story: Story, plain: Plain) -> None:
    for prompt in story.prompts[-4:]:
        story.engine.forget()
        assert story.engine.answer(prompt, 1).cached == whole_chunks(len(prompt))
        plain.engine.forget()
        plain.engine.answer(prompt, 1)
        loaded, computed = story.engine.kv(prompt), plain.engine.kv(prompt)
        assert loaded.shape[1] == computed.shape[1] == len(prompt) // CHUNK
        assert np.array_equal(loaded, computed)


def test_warm_from_disk_after_restart(story: Story, plain: Plain) -> None:
    before = story.place.node.hello.pid, story.engine.pid
    story.restart()
    assert story.place.node.hello.pid != before[0]
    assert story.engine.pid != before[1]
    check_warm(story, plain, "disk")
    assert story.place.count('promotions_total{outcome="done"}') > 0
