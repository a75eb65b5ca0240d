"""Several who share: two engines on one node, two requests for one document, a queue, a reset."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.engine.engine import CHUNK, Engine, Prompt, request, whole_chunks
from tests.engine.place import Place
from tests.engine.plain import Plain, Texts
from tests.engine.shared import Engines

pytestmark = pytest.mark.engine


class Pair(NamedTuple):
    """Two engines on one node."""

    place: Place
    one: Engine
    other: Engine


@pytest.fixture(scope="module")
def pair(engines: Engines, tiny_llama: Path) -> Pair:
    place, one = engines.shared(tiny_llama)
    pair = Pair(place, one, engines.shared(tiny_llama, number=1).engine)
    pair.one.wait()
    pair.other.wait()
    return pair


def test_one_stores_and_the_other_hits(pair: Pair, plain: Plain, prompts: list[Prompt]) -> None:
    place, one, other = pair
    assert one.pid != other.pid
    cold = one.answers(prompts)
    assert {answer.cached for answer in cold} == {0}
    assert [answer.tokens for answer in cold] == plain.cold(prompts)
    place.await_stored(one, prompts)
    warm = other.answers(prompts)
    assert [answer.cached for answer in warm] == [whole_chunks(len(p)) for p in prompts]
    assert [answer.tokens for answer in warm] == plain.warm(prompts)
    # Whoever came first started a node, and the other joined it.
    assert len(list(place.folder.rglob("*.sock"))) == 1
    place.check()


def test_both_at_once(pair: Pair, plain: Plain, texts: Texts) -> None:
    """The same new documents, in opposite orders: each is computed, or hit, and always right."""
    place, one, other = pair
    # No whole number of chunks, whose hit vLLM cuts otherwise than we do.
    prompts = texts.of(*(151 + 13 * i for i in range(30)))
    with ThreadPoolExecutor(2) as both:
        asked = both.submit(one.answers, prompts), both.submit(other.answers, prompts[::-1])
        answers = asked[0].result(), asked[1].result()[::-1]
    for prompt, ours, theirs in zip(prompts, *answers, strict=True):
        for answer in (ours, theirs):
            assert answer.tokens == plain.upon_hit(prompt, answer.cached)[0].tokens
    assert any(answer.cached for answer in answers[0])
    assert any(answer.cached for answer in answers[1])
    for engine in (one, other):
        place.await_stored(engine, prompts)
        engine.forget()
        again = engine.answers([request(prompt, 1) for prompt in prompts])
        assert [answer.cached for answer in again] == [whole_chunks(len(p)) for p in prompts]
    place.check()


def test_two_requests_for_one_document_load_it_once(pair: Pair, plain: Plain, texts: Texts) -> None:
    place, engine = pair.place, pair.one
    for prompt in texts.of(700, 1100, 1300):
        cold = engine.answer(prompt)
        place.await_stored(engine, [prompt])
        place.flush()
        place.node.clear(engine.keys(prompt), ["host"])
        engine.forget()
        promoted = place.count("promotions_total")
        stored = place.count("stored_objects_total")
        answers = engine.answers([prompt, prompt], in_turn=False)
        assert place.count("promotions_total") - promoted == len(prompt) // CHUNK
        records = place.node.status()["requests"][-2:]
        assert sum(record["loaded_tokens"] for record in records) == whole_chunks(len(prompt))
        assert [answer.cached for answer in answers] == [whole_chunks(len(prompt))] * 2
        assert answers[0].tokens[0] == answers[1].tokens[0] == cold.tokens[0]
        assert cold.tokens == plain.cold([prompt])[0]
        assert place.count("stored_objects_total") == stored
    place.check()


def test_aborted_while_loading_and_storing(pair: Pair, plain: Plain, texts: Texts) -> None:
    place, engine = pair.place, pair.one
    engine.forget()
    prompts = texts.of(*(400 + 50 * i for i in range(8)))
    whole = engine.free_blocks()
    assert whole[0] == whole[1]
    for keep_busy in (False, True):
        for round_number in range(2):
            place.node.clear()
            engine.forget()
            # Cold they are aborted while they compute and store, warm while they load.
            for steps in (1, 2, 3):
                asked = [request(prompt) for prompt in prompts]
                after = [(steps + i + round_number) % 4 for i in range(len(prompts))]
                if keep_busy:
                    asked.insert(0, request(texts.of(200)[0], 30))
                    after.insert(0, -1)
                engine.call("abort_soon", requests=asked, steps=after)
                assert engine.free_blocks() == whole
                engine.forget()
            place.check()
    answers = engine.answers(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens[0] == plain.upon_hit(prompt, answer.cached)[0].tokens[0]
    place.check()


def test_aborted_while_the_node_stands_still(pair: Pair, plain: Plain, texts: Texts) -> None:
    """Requests end at once; their blocks come back when their loads have ended."""
    place, engine = pair.place, pair.one
    prompts = texts.of(600, 800, 1000)
    engine.answers(prompts)
    place.await_stored(engine, prompts)
    place.flush()
    engine.forget()
    whole = engine.free_blocks()
    for steps in (1, 2, 3):
        for prompt in prompts:
            place.node.clear(engine.keys(prompt), ["host"])
        with place.stopped_at_load(engine):
            ids = engine.call("add", requests=[request(prompt) for prompt in prompts])["ids"]
            engine.call("step", count=steps)
            engine.call("abort", ids=ids)
            engine.call("finish")
        engine.forget()
        assert engine.free_blocks() == whole
        place.check()
    assert [answer.tokens for answer in engine.answers(prompts)] == plain.warm(prompts)
    place.check()


def test_reset_of_the_connector_s_cache(pair: Pair, plain: Plain, texts: Texts) -> None:
    """The engine that reset finds nothing from before, the other one still does."""
    place, _, other = pair
    one = place.engine()  # it leaves the namespace of the others for good
    prompts = texts.of(300, 500, 700, 900)
    one.answers(prompts)
    place.await_stored(one, prompts)
    one.forget(connector=True)
    other.forget()
    again = one.answers(prompts)
    assert {answer.cached for answer in again} == {0}
    assert [answer.tokens for answer in again] == plain.cold(prompts)
    assert [answer.tokens for answer in other.answers(prompts)] == plain.warm(prompts)
    place.await_stored(one, prompts)
    one.forget()
    assert [answer.tokens for answer in one.answers(prompts)] == plain.warm(prompts)
    one.close()
    place.check()


def test_queue_longer_than_the_pool(tiny_llama: Path, plain: Plain, texts: Texts) -> None:
    """Host memory for two documents, and sixteen requests at once."""
    prompts = texts.of(*(900 + 7 * i for i in range(16)))
    bytes_each = 7 * (3 * 2 * 2 * CHUNK * 64 * 2 + 4096)
    with Place(tiny_llama, {"host.capacity": str(2 * bytes_each)}) as place:
        place.use_disk()
        engine = place.engine()
        whole = engine.free_blocks()
        for round_number in range(3):
            answers = engine.answers([request(p) for p in prompts], in_turn=False)
            assert {len(answer.tokens) for answer in answers} == {32}
            firsts = [answer.tokens[0] for answer in answers]
            assert firsts == [tokens[0] for tokens in plain.cold(prompts)]
            if round_number:
                assert sum(answer.cached for answer in answers) > 0
            engine.forget()
            assert engine.free_blocks() == whole
            place.check()
            place.flush()
        # One after the other all of what the disk has is hit.
        answers = engine.answers([request(prompt, 1) for prompt in prompts])
        firsts = [answer.tokens[0] for answer in answers]
        assert firsts == [tokens[0] for tokens in plain.cold(prompts)]
        assert sum(answer.cached for answer in answers) > 0
        place.check()
