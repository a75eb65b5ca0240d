"""What a prompt parts from inside it, of models whose layers are of several kinds: a real vLLM.

A load ends where no block does, in every group. Weights are float32 here, so that an answer does
not hang on how the work is split, and every token must be plain vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from tests.engine.engine import CHUNK, Answer, Engine, Prompt, whole_chunks
from tests.engine.kinds import KINDS, Kind
from tests.engine.place import Place, eventually, known_tokens
from tests.engine.plain import Texts
from tests.engine.test_parallel import detached

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

ALWAYS = "tiny_gemma3"
OTHERS = ("tiny_gpt_oss", "tiny_mistral", "tiny_llama4", "gemma3")
MARK = 16


class Site(NamedTuple):
    """An engine with a model, its node, and what to ask; without its connector it is plain vLLM."""

    kind: Kind
    place: Place
    engine: Engine
    texts: Texts

    def store(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Have the node know prompts and answers, and vLLM forget them; the tokens it has."""
        stored = self.place.count("stored_objects_total")
        answers = self.engine.answers(prompts)
        known = [known_tokens(*pair) for pair in zip(prompts, answers, strict=True)]
        chunks = sum(len(one) // CHUNK + (len(one) % CHUNK >= MARK) for one in known)
        eventually(
            lambda: (
                self.place.count("stored_objects_total") == stored + chunks * self.kind.num_groups
            ),
            "whole chunks and the ends are stored, of every group",
            60.0,
        )
        self.engine.forget()
        return known

    def check(self, prompts: Sequence[Prompt], loaded: Sequence[int]) -> None:
        """So many tokens of each come from the node, and all answers are plain vLLM's."""
        answers = self.engine.answers(prompts)
        assert [answer.cached for answer in answers] == list(loaded)
        assert self.place.loaded(prompts[-1], answers[-1]) == loaded[-1]
        self.compare(prompts, answers)

    def compare(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
        """Nothing is held any more, and the answers are plain vLLM's."""
        self.place.check()
        with detached(self.engine) as plain:
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens in [one.tokens for one in plain.both(prompt)]


@pytest.fixture(
    scope="module",
    params=[ALWAYS, *(pytest.param(name, marks=pytest.mark.more) for name in OTHERS)],
)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    from transformers import AutoTokenizer

    kind = KINDS[request.param]
    texts = Texts(AutoTokenizer.from_pretrained(kind.folder), f"inside {kind.name}")
    with Place(kind.folder, {"inside": "on"}) as place:
        place.use_disk()
        engine = place.engine(**kind.engine(dtype="float32"))
        place.await_ready(engine)
        assert engine.wait()["num_groups"] == kind.num_groups
        yield Site(kind, place, engine, texts)


def test_the_next_turn_of_a_chat(site: Site) -> None:
    """All that is known, to the last token; lengths are spread over a chunk."""
    lengths = [(300, 800)[number % 2] + 17 * number for number in range(8)]
    known = site.store(site.texts.of(*lengths))
    turns = site.texts.of(*[30] * len(known))
    prompts = [[*said, *turn] for said, turn in zip(known, turns, strict=True)]
    loaded = [len(said) if len(said) % CHUNK >= MARK else whole_chunks(len(said)) for said in known]
    assert all(len(said) - tokens < MARK for said, tokens in zip(known, loaded, strict=True))
    site.check(prompts, loaded)


def test_another_question_about_the_same_document(site: Site) -> None:
    """At most 15 tokens that are stored are computed again, wherever it parts."""
    places = [40, 128 + 7, 256 + 50, 384 + 127, 512 + 16, 640 + 50, 700]
    documents = site.texts.of(*[700] * len(places))
    site.store(documents)
    questions = site.texts.of(*[50] * len(places))
    prompts = [
        [*document[:at], *question]
        for document, at, question in zip(documents, places, questions, strict=True)
    ]
    loaded = [whole_chunks(at) + at % CHUNK // MARK * MARK for at in places]
    assert all(at - tokens < MARK for at, tokens in zip(places, loaded, strict=True))
    site.check(prompts, loaded)


def test_the_same_prompts_again(site: Site) -> None:
    """To the last mark; where a chunk ends with them, all but the token that vLLM computes."""
    prompts = site.texts.of(200, 384, 530)
    site.store(prompts)
    site.check(prompts, [192, 383, 528])


def test_out_of_what_lies_on_disk(site: Site) -> None:
    """A chunk that a prompt parts from, and a tail, each with an object of every group."""
    document, chat, question = site.texts.of(500, 450, 40)
    _, said = site.store([document, chat])
    site.place.flush()
    site.place.node.clear(tiers=["host"])
    site.check([[*document[:440], *question], [*said, *question]], [432, len(said)])


def test_several_that_part_from_the_same_chunk_at_once(site: Site) -> None:
    document, *questions = site.texts.of(500, 40, 60, 80)
    site.store([document])
    prompts = [[*document[:440], *question] for question in questions]
    answers = site.engine.answers(prompts, in_turn=False)
    # Those that wait for the first one find whole chunks of it in vLLM's own cache.
    assert {432} <= {answer.cached for answer in answers} <= {384, 432}
    site.compare(prompts, answers)
