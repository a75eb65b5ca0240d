"""Prompts that are put together of what was computed elsewhere, in a real vLLM, in float32.

All tokens computed anew, in whatever cuts, is what plain vLLM computes. And whichever tokens a plan
takes, the answer is the one that transformers gives to the same rows: so keys are turned rightly,
every row lies where it belongs, and what is computed anew sees all that comes before it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.engine.engine import CHUNK, Engine, Prompt, request
from tests.engine.place import Place, eventually
from tests.engine.plain import Texts
from tests.engine.rows import Moved, Reference, Rows

from kvstrata.blend import BY_DEVIATION, choose
from kvstrata.blend.anchors import anchor_weights, sketch
from kvstrata.blend.signposts import Signpost
from kvstrata.testing import models
from kvstrata.testing.engine import CONNECTOR

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

NEW, TOLD = 6, 20
CALM: dict[str, Any] = {"dtype": "float32", "max_model_len": 4096}
TP = {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
OFF_STACK = {
    **CONNECTOR,
    "kv_connector": "OffStack",
    "kv_connector_module_path": "tests.engine.off_stack",
}
ROUNDING = 1e-4
#: both compute cosines of angles of a thousand and more in float32, each in its own way
TURNED = 2e-3
#: a head of a chunk and a bit, three documents that end where a chunk does, and a question
HEAD, TEXT, QUESTION = 150, 334, 17
OTHERS = (250, 251, 252)
END = HEAD + 3 * TEXT
assert END % CHUNK == 0


def hint(segments: list[list[int]], **more: Any) -> dict[str, Any]:
    return {"kvstrata": {"blend": {"segments": segments, **more}}}


class Shelf:
    """Documents, the prompts that each was computed in, and one that has them all."""

    def __init__(self, texts: Texts) -> None:
        lengths = (HEAD, TEXT, TEXT, TEXT, *OTHERS, CHUNK, QUESTION)
        head, *rest = texts.of(*lengths)
        documents, others, end, self.question = rest[:3], rest[3:6], rest[6], rest[7]
        #: each behind another text than here, and with a whole chunk behind it
        self.sources = [
            [*head, *other, *document, *end]
            for document, other in zip(documents, others, strict=True)
        ]
        self.segments = [[HEAD + i * TEXT, HEAD + (i + 1) * TEXT] for i in range(3)]
        self.order = (2, 0, 1)
        self.prompt: Prompt = [
            *head, *(token for number in self.order for token in documents[number]), *self.question
        ]  # fmt: skip

    @property
    def moved(self) -> list[Moved]:
        """For the reference."""
        return [
            Moved(self.sources[number], HEAD + OTHERS[number], HEAD + place * TEXT, TEXT)
            for place, number in enumerate(self.order)
        ]

    def naming(self) -> list[dict[str, Any]]:
        """Requests that have the documents stored."""
        return [
            request(source, 1, transfer=hint([[HEAD + other, HEAD + other + TEXT]]))
            for source, other in zip(self.sources, OTHERS, strict=True)
        ]

    def blended(self, plan: str, ratio: float = 0.0, bound: float | None = None) -> dict[str, Any]:
        """A request that reuses them."""
        more = {} if bound is None else {"bound": bound}
        transfer = hint(self.segments, plan=plan, ratio=ratio, **more)
        return request(self.prompt, NEW, transfer=transfer, logprobs=TOLD)

    def plain(self) -> dict[str, Any]:
        """One that does not."""
        transfer = {"kvstrata": {"load": False, "store": False}}
        return request(self.prompt, NEW, transfer=transfer, logprobs=TOLD)


class Told(NamedTuple):
    """An answer: its tokens, and for each the logarithms of some probabilities."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


class Library:
    """An engine that blends, and its node."""

    def __init__(self, place: Place, **options: Any) -> None:
        self.place = place
        self.engine: Engine = place.engine(**options)

    def store(self, shelf: Shelf, ranks: int = 1) -> None:
        """Have the node know the documents; the first prompt shows that the engine can blend."""
        self.engine.answers(shelf.naming())
        self.place.await_stored(self.engine, shelf.sources, ranks)

        def found() -> bool:
            self.ask(shelf.blended("none"))
            return bool(self.record()["blended_tokens"] == 3 * TEXT)

        eventually(found, "the documents are found in their new places", 60)

    def ask(self, asked: dict[str, Any], *others: dict[str, Any]) -> Told:
        """One answer, while others are given; vLLM itself has nothing of it."""
        self.engine.forget()
        reply = self.engine.call("ask", requests=[asked, *others], in_turn=False)["answers"][0]
        each = [{int(token): one for token, one in step.items()} for step in reply["logprobs"]]
        return Told(reply["tokens"], each)

    def record(self) -> dict[str, Any]:
        """Of the request that ended last."""
        return self.place.last_record(END + QUESTION + NEW)


@contextlib.contextmanager
def library(model: Path, **options: Any) -> Iterator[Library]:
    settings = {"blend": "on", "hints": "all", "deadlines.load": "20s"}
    with Place(model, settings) as place:
        yield Library(place, **{**CALM, **options})


def furthest(one: Sequence[dict[int, float]], other: Sequence[Any]) -> float:
    """Of two answers' log-probabilities, of those that both tell; infinite if they tell of none."""
    off = [
        abs(value - float(step[token]))
        for told, step in zip(one, other, strict=True)
        for token, value in told.items()
        if not isinstance(step, dict) or token in step
    ]
    return max(off, default=math.inf)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one-go"),
        pytest.param(
            {"max_num_batched_tokens": 173, "connector": OFF_STACK}, id="slices-off-stack"
        ),
        pytest.param({"enforce_eager": False}, id="compiled"),
        pytest.param(TP, id="two-ranks"),
    ],
)
def test_all_computed_anew_is_what_vllm_computes(
    tiny_llama: Path, texts: Texts, options: dict[str, Any]
) -> None:
    shelf = Shelf(texts)
    ranks = options.get("tensor_parallel_size", 1)
    with library(tiny_llama, **options) as place:
        place.store(shelf, ranks)
        wanted = place.ask(shelf.plain())
        # Beside one that decodes the slices are cut otherwise in every step.
        others = [request(text, 40) for text in texts.of(33, 70)]
        for plan, beside in (("all", []), ("all", others), ("random", others)):
            told = place.ask(shelf.blended(plan, 1.0), *beside)
            assert beside or place.record()["recomputed_tokens"] == END - CHUNK, place.record()
            assert told.tokens == wanted.tokens
            assert furthest(told.logprobs, wanted.logprobs) < ROUNDING
        # Some computed anew, by any plan: something else, but nothing breaks.
        for plan in ("share", "edges", "random", "none"):
            told = place.ask(shelf.blended(plan, 0.2))
            assert furthest(told.logprobs, wanted.logprobs) > 100 * ROUNDING
        if ranks > 1:
            # The right ones, and the same on every rank: else it would be another answer.
            reference = Reference(tiny_llama)
            check_a_plan(place, shelf, reference, "deviation", 0.15)
            check_a_plan(place, shelf, reference, "deviation", 1.0, bound=0.5)
        # Of what they left in vLLM's own cache nobody has anything.
        exact = request(shelf.prompt, NEW)
        assert place.engine.answers([shelf.blended("deviation", 0.15), exact])[1].tokens == (
            wanted.tokens
        )
        place.place.check()


@pytest.mark.parametrize(
    ("name", "interleaved", "options"),
    [
        pytest.param("tiny_llama", False, {}, id="llama"),
        pytest.param("tiny_yarn", False, {}, id="yarn"),
        pytest.param("tiny_glm4", True, {"max_num_batched_tokens": 211}, id="glm4-in-slices"),
    ],
)
def test_answers_are_transformers_own(
    texts: Texts, name: str, interleaved: bool, options: dict[str, Any]
) -> None:
    model = models.MODELS[name]()
    reference, shelf = Reference(model, interleaved), Shelf(texts)
    with library(model, **options) as place:
        place.store(shelf)
        exact = place.ask(shelf.plain())
        for plan in ("none", "edges", "deviation"):
            told = check_a_plan(place, shelf, reference, plan, 0.15)
            assert furthest(told.logprobs, exact.logprobs) > 10 * TURNED
        a_mean_of_three_prefixes_is_that(place, reference, shelf, texts)
        place.place.check()


def a_mean_of_three_prefixes_is_that(
    place: Library, reference: Reference, shelf: Shelf, texts: Texts
) -> None:
    """By the plan `anchors`: the rows of one document are weighted, those of the others alone."""
    head, number = shelf.prompt[:HEAD], shelf.order[1]
    was = HEAD + OTHERS[number]
    document = shelf.sources[number][was : was + TEXT]
    behind = shelf.sources[number][was + TEXT :]
    here = HEAD + TEXT
    # What lies before it in one of them ends as what does here, so that this one counts most.
    sources, taken = [shelf.sources[number]], {place_of(place.engine, shelf.sources[number], was)}
    for length, end in ((40, shelf.prompt[here - 70 : here]), (131, [])):
        start = HEAD + length + len(end)
        while True:
            (other,) = texts.of(length)
            source = [*head, *other, *end, *document, *behind]
            if (number_of_place := place_of(place.engine, source, start)) not in taken:
                break
        taken.add(number_of_place)
        sources.append(source)
        segments = [[start, start + TEXT]]
        place.engine.answers([request(source, 1, transfer=hint(segments))])
    place.place.await_stored(place.engine, sources)
    starts = [was, HEAD + 40 + 70, HEAD + 131]
    weights = anchor_weights(
        sketch(shelf.prompt[:here]),
        [sketch(source[:start]) for source, start in zip(sources, starts, strict=True)],
    )
    assert weights[1] > 2 * max(weights[0], weights[2])

    rows = reference.blended(shelf.prompt, shelf.moved, NEW)
    each = [
        reference.blended(shelf.prompt, [Moved(source, start, here, TEXT)], NEW).layers
        for source, start in zip(sources, starts, strict=True)
    ]
    document_rows = rows.layers[:, :, :, here : here + TEXT]
    document_rows[:] = sum(
        float(weight) * one[:, :, :, here : here + TEXT]
        for weight, one in zip(weights, each, strict=True)
    )
    reference.read(rows, shelf.prompt, range(HEAD))
    wanted = reference.answer(rows, shelf.prompt, END, NEW)

    def told() -> bool:  # signposts are written behind
        return furthest(place.ask(shelf.blended("anchors")).logprobs, wanted) < TURNED

    eventually(told, "the mean of three prefixes", 60)
    assert place.record()["blend_plan"] == "anchors 0"
    assert place.record()["recomputed_tokens"] == HEAD - CHUNK
    assert furthest(place.ask(shelf.blended("none")).logprobs, wanted) > 10 * TURNED


def place_of(engine: Engine, prompt: Prompt, start: int) -> int:
    """Which of its places a document has that begins here."""
    return Signpost(start, tuple(engine.keys(prompt)[start // CHUNK :])).place


def check_a_plan(
    place: Library,
    shelf: Shelf,
    reference: Reference,
    plan: str,
    ratio: float,
    bound: float | None = None,
) -> Told:
    """Ask by a plan, and by about this ratio or bound: as many are computed, and the right ones."""
    rows = reference.blended(shelf.prompt, shelf.moved, NEW)
    reused = [range(*segment) for segment in shelf.segments]
    places = [position for one in reused for position in one]
    # What is no document's: the head is exact, the question is vLLM's.
    reference.read(rows, shelf.prompt, range(HEAD))
    off = reference.deviation(rows, shelf.prompt, places)
    if bound is None:
        ratio = clear_ratio(off, ratio)
    else:
        bound = clear_bound(off, bound)
    chosen = choose(plan, ratio, reused, off if plan in BY_DEVIATION else None, bound=bound)
    if chosen:
        reference.read(rows, shelf.prompt, chosen)
    wanted = reference.answer(rows, shelf.prompt, END, NEW)

    told = place.ask(shelf.blended(plan, ratio, bound))
    record = place.record()
    assert record["blended_tokens"] == 3 * TEXT
    assert record["recomputed_tokens"] == HEAD - CHUNK + len(chosen)
    assert told.tokens == [int(step.argmax()) for step in wanted]
    assert furthest(told.logprobs, wanted) < TURNED
    return told


def clear_ratio(off: Any, ratio: float) -> float:
    """One near this at which rounding does not decide which token is the last one chosen."""
    return clear_count(off, round(ratio * len(off))) / len(off)


def clear_bound(off: Any, bound: float) -> float:
    """One near this at which it does not either, nor how many are."""
    worst = np.sort(off)[::-1].astype(np.float64)
    left = worst[::-1].cumsum()[::-1]  # of each, and of all that are off by less
    count = clear_count(off, int((left > bound * left[0]).sum()))
    # Between what is left with the last one chosen, and without it.
    return float((left[count - 1] + left[count]) / 2 / left[0])


def clear_count(off: Any, count: int) -> int:
    """The next number of tokens of which the last one is clearly further off than the next one."""
    worst = np.sort(off)[::-1]
    for more in range(count, len(off)):
        if worst[more - 1] > 1.002 * worst[more]:
            return more
    raise AssertionError("all tokens are off alike")


def test_rows_of_an_unturned_prompt_are_something_else(tiny_llama: Path, texts: Texts) -> None:
    """The reference can tell: it is not that all answers are alike."""
    reference, shelf = Reference(tiny_llama), Shelf(texts)
    rows = reference.blended(shelf.prompt, shelf.moved, NEW)
    reference.read(rows, shelf.prompt, range(HEAD))
    turned = reference.answer(rows, shelf.prompt, END, 1)
    other = Rows(tuple(rows.layers.shape))
    for prompt, was, position, count in shelf.moved:
        source = Rows((*rows.layers.shape[:3], len(prompt), rows.layers.shape[4]))
        reference.read(source, prompt, range(len(prompt)))
        other.layers[:, :, :, position : position + count] = source.layers[
            :, :, :, was : was + count
        ]
    reference.read(other, shelf.prompt, range(HEAD))
    unturned = reference.answer(other, shelf.prompt, END, 1)
    assert float((turned[0] - unturned[0]).abs().max()) > 100 * ROUNDING
