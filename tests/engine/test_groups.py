"""A hit never changes an answer of a model whose layers are of several kinds.

Cold, warm from host memory, from an engine beside it, from disk after a restart of everything, in
pieces, after preemption, and when the node dies under a load.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tests.engine.engine import CHUNK, Engine, Prompt, request, whole_chunks
from tests.engine.kinds import KINDS, NEW, PARAMS, Kind
from tests.engine.place import Place, eventually
from tests.engine.plain import Plain, Texts
from tests.engine.shared import Engines

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

# No whole multiples of a chunk, whose hit vLLM cuts otherwise than we do. Within a window, at its
# edge, and beyond; 2, 3, 5 and 8 chunks to load.
LENGTHS = (90, 129, 300, 450, 700, 1100)


@dataclass
class Story:
    """An engine with a model, its node, plain vLLM beside it, and what was asked."""

    kind: Kind
    place: Place
    engine: Engine
    plain: Plain
    prompts: list[Prompt]

    @property
    def cached(self) -> list[int]:
        """Tokens that each prompt has cached when all of it is stored."""
        return [whole_chunks(len(prompt)) for prompt in self.prompts]

    def restart(self) -> None:
        """End engine and node, and start both again over the same disk."""
        self.place.flush()
        self.place.end()
        self.engine = self.place.engine(fresh=True, **self.kind.engine())
        self.place.await_ready(self.engine)

    def check_warm(self, engine: Engine) -> None:
        """All prompts again: whole chunks hit, the answers plain vLLM's upon its own hit.

        And once more, upon vLLM's own hit of what was loaded (sglang#39830).
        """
        expected = self.plain.warm(self.prompts)
        engine.forget()
        warm = engine.answers(self.prompts)
        assert [answer.cached for answer in warm] == self.cached
        assert [answer.tokens for answer in warm] == expected
        assert self.place.loaded(self.prompts[-1], warm[-1]) == self.cached[-1]
        again = engine.answers(self.prompts)
        assert [answer.cached for answer in again] == self.cached
        assert [answer.tokens for answer in again] == expected
        assert self.place.last_record(len(self.prompts[-1]) + NEW)["loaded_tokens"] == 0
        self.place.check()


def await_hits(engine: Engine, prompts: list[Prompt], cached: list[int]) -> None:
    """Return once what was asked before is stored, so that it hits."""

    def hits() -> bool:
        engine.forget()
        answers = engine.answers([request(prompt, 1) for prompt in prompts])
        return [answer.cached for answer in answers] == cached

    eventually(hits, f"hits of {cached} tokens")


@pytest.fixture(scope="module", params=PARAMS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def tokenizer(kind: Kind) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(kind.folder)


@pytest.fixture(scope="module")
def story(kind: Kind, tokenizer: Any, engines: Engines) -> Iterator[Story]:
    with Place(kind.folder) as place:
        place.use_disk()
        plain = engines.plain(kind.folder, **kind.engine())
        engine = place.engine(**kind.engine())
        yield Story(kind, place, engine, plain, Texts(tokenizer, kind.name).of(*LENGTHS))


def test_plain_vllm_runs_it(story: Story) -> None:
    """And its answers need what came first, so that a wrong prefix would be seen."""
    assert story.plain.engine.wait()["num_groups"] == story.kind.num_groups
    assert story.plain.engine.wait()["block_tokens"] == CHUNK
    prompts = [prompt[:300] for prompt in story.prompts if len(prompt) >= 300]
    changed = [[*b[:CHUNK], *a[CHUNK:]] for a, b in itertools.pairwise(prompts)]
    assert story.plain.cold(changed) != story.plain.cold(prompts[:-1])


def test_cold(story: Story) -> None:
    about = story.engine.wait()
    assert about == story.plain.engine.wait()
    cold = story.engine.answers(story.prompts)
    assert {answer.cached for answer in cold} == {0}
    assert [answer.tokens for answer in cold] == story.plain.cold(story.prompts)
    story.place.check()


def test_warm_from_host_memory(story: Story) -> None:
    await_hits(story.engine, story.prompts, story.cached)
    story.check_warm(story.engine)


def test_another_engine_on_the_node(story: Story) -> None:
    other = story.place.engine(**story.kind.engine())
    story.check_warm(other)
    other.close()


def test_warm_from_disk_after_a_restart_of_everything(story: Story) -> None:
    """Where others answered 38 of 38 wrong (LMCache#4492)."""
    before = story.engine.pid
    story.restart()
    assert story.engine.pid != before
    story.check_warm(story.engine)
    assert story.place.count('promotions_total{outcome="done"}') > 0
