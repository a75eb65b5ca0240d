"""What else vLLM does: pipelines, images, pooling, grammars, data parallelism, resets."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.engine.engine import CHUNK, Answer, Engine, Prompt, request, whole_chunks
from tests.engine.place import Place, eventually
from tests.engine.plain import Plain, Texts
from tests.engine.servers import Site
from tests.engine.shared import Shared

from kvstrata.testing.models.vision import IMAGE_TOKEN, IMAGE_TOKENS

pytestmark = pytest.mark.engine


class Answers(NamedTuple):
    """What an engine answers when nothing is cached, upon vLLM's own hit, and from the node."""

    cold: list[Answer]
    local: list[Answer]
    warm: list[Answer]


def three_times(
    place: Place, engine: Engine, asked: Sequence[Mapping[str, Any] | Prompt], stored: int
) -> Answers:
    """Ask thrice, and find that the node's hits are as good as vLLM's own.

    Args:
        stored: objects that the first time leaves at least.
    """
    engine.wait()
    before = place.count("stored_objects_total")
    cold = engine.answers(asked)
    eventually(lambda: place.count("stored_objects_total") >= before + stored, "stored")
    local = engine.answers(asked)
    engine.forget()
    warm = engine.answers(asked)
    records = json.dumps(place.node.status()["requests"][-len(asked) :])
    assert [answer.cached for answer in warm] == [answer.cached for answer in local], records
    assert [answer.tokens for answer in warm] == [answer.tokens for answer in local]
    place.check()
    return Answers(cold, local, warm)


def test_a_pipeline_of_two_stages(tiny_llama: Path, texts: Texts) -> None:
    """Each stage keeps its own layers, and the first computes a step ahead of the second."""
    prompts = texts.of(300, 700)
    options: dict[str, Any] = {
        "pipeline_parallel_size": 2, "enforce_eager": False, "max_model_len": 2048,
        "new_tokens": 6,
    }  # fmt: skip
    with Place(tiny_llama) as place:
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        engine = place.engine(environment=environment, **options)
        answers = three_times(place, engine, prompts, 2 * sum(len(p) // CHUNK for p in prompts))
        assert {answer.cached for answer in answers.cold} == {0}
        assert [answer.cached for answer in answers.warm] == [whole_chunks(len(p)) for p in prompts]
        # Side by side one load waits in the background, and the other's chunks are fenced.
        engine.forget()
        loaded = place.count("hit_chunks_total")
        both = engine.answers(prompts, in_turn=False)
        assert [len(answer.tokens) for answer in both] == [6, 6]
        assert place.count("hit_chunks_total") > loaded
        place.check()


def test_images_are_told_apart(tiny_idefics3: Path, texts: Texts) -> None:
    """The placeholders of two images are alike; what comes before an image is shared."""
    from transformers import AutoTokenizer

    mark = AutoTokenizer.from_pretrained(tiny_idefics3).convert_tokens_to_ids(IMAGE_TOKEN)
    text, other = texts.of(400, 60)
    late = [*text[:150], mark, *text[150:]]
    early = [*other, mark, *text[:200], mark, *text[200:300]]
    options: dict[str, Any] = {"max_model_len": 1024, "new_tokens": 8}

    def ask(*seeds: int) -> list[dict[str, Any]]:
        return [
            request(late, 8, images=seeds[:1]),
            request(early, 8, images=seeds),
        ]

    lengths = [len(late) + IMAGE_TOKENS - 1, len(early) + 2 * (IMAGE_TOKENS - 1)]
    with Place(tiny_idefics3) as place:
        engine, second = place.engine(**options), place.engine(**options)
        first = three_times(place, engine, ask(1, 2), sum(n // CHUNK for n in lengths))
        assert [answer.cached for answer in first.cold] == [0, 0]
        assert [answer.cached for answer in first.warm] == [whole_chunks(n) for n in lengths]
        engine.forget()
        # Another image late, another one first, and the same two exchanged.
        others = [*ask(3, 4), request(early, 8, images=[2, 1])]
        answers = engine.answers(others)
        assert [answer.cached for answer in answers] == [CHUNK, 0, 0]
        assert answers[0].tokens != first.cold[0].tokens
        assert len({tuple(one.tokens) for one in (first.cold[1], *answers[1:])}) == 3
        # The first image again, and another one second: shared up to that.
        engine.forget()
        place.check()
        (partly,) = engine.answers([request(early, 8, images=[1, 5])])
        assert partly.cached == 2 * CHUNK
        # What identifies an image is not this process's.
        assert [answer.cached for answer in second.answers(ask(1, 2))] == [
            answer.cached for answer in first.warm
        ]
        place.check()


def test_pooling_requests_are_left_alone(shared: Shared, texts: Texts) -> None:
    """Their outputs are of every token, or of none that is computed, so nothing is cached."""
    prompts = texts.of(200, 300)
    place = shared.place
    options: dict[str, Any] = {"runner": "pooling", "convert": "embed", "max_model_len": 1024}
    with closing(place.engine(**options)) as engine:
        engine.wait()
        before = [place.count(name) for name in ("matches_total", "stored_objects_total")]
        vectors = engine.call("embed", prompts=prompts)["vectors"]
        engine.forget()
        assert engine.call("embed", prompts=prompts)["vectors"] == vectors
        after = [place.count(name) for name in ("matches_total", "stored_objects_total")]
        assert before == after
        assert place.last_record(len(prompts[-1]))["miss"] == "pooling requests are not cached"
    place.check()


def test_an_answer_follows_its_grammar_warm_as_cold(
    shared: Shared, plain: Plain, texts: Texts, tokenizer: Any
) -> None:
    pattern = "[a-z]{3,5}( [a-z]{3,5}){40}"
    asked = [request(prompt, 12, regex=pattern) for prompt in texts.of(200, 400)]
    place, engine = shared
    answers = three_times(place, engine, asked, sum(len(one["prompt"]) // CHUNK for one in asked))
    plain.engine.forget()
    expected = [plain.engine.answers(asked) for _ in range(2)]
    assert [answer.tokens for answer in answers.cold] == [one.tokens for one in expected[0]]
    assert [answer.tokens for answer in answers.warm] == [one.tokens for one in expected[1]]
    for answer in answers.warm:
        assert re.fullmatch("[a-z ]+", tokenizer.decode(answer.tokens))


def test_a_reset_while_loads_run(tiny_llama: Path, texts: Texts) -> None:
    """The load ends well and its request is right; what was stored before is found no more."""
    (prompt,) = texts.of(700)
    with Place(tiny_llama) as place:
        place.use_disk()
        engine = place.engine(new_tokens=8)
        answers = three_times(place, engine, [prompt], len(prompt) // CHUNK)
        place.flush()
        place.node.clear(engine.keys(prompt), ["host"])
        engine.forget()
        with place.stopped_at_load(engine):
            engine.call("add", requests=[request(prompt, 8)])

            def waits() -> bool:
                assert engine.call("step", count=1)["unfinished"]
                blocks = engine.call("blocks")
                return bool(blocks["free"] < blocks["all"])

            eventually(waits, "it waits for its load")
            assert not engine.call("try_reset")["done"], "which holds blocks"
        (output,) = engine.call("finish")["outputs"].values()
        loaded = place.last_record(len(prompt) + 8)["loaded_tokens"]
        assert loaded == whole_chunks(len(prompt))
        assert output["tokens"] == answers.warm[0].tokens
        engine.forget(connector=True)
        again = three_times(place, engine, [prompt], len(prompt) // CHUNK)
        assert again == answers, "as if nothing had been stored, then as ever"


def asked_of_rank(site: Site, rank: int, prompt: Prompt) -> list[int]:
    """The tokens that one of a server's data-parallel ranks answers."""
    body = {
        "model": "model", "prompt": prompt, "max_tokens": 8, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)}
    url = f"{site.server.url}/v1/completions"
    asked = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=120) as response:
        tokens: list[int] = json.load(response)["choices"][0]["token_ids"]
    return tokens


def test_data_parallel_ranks_share_a_node(tiny_llama: Path, texts: Texts) -> None:
    """What one rank has computed the other loads."""
    prompts = texts.of(300, 600)
    with Site(tiny_llama, {}, {"data-parallel-size": 2}) as site:
        site.server.wait()
        cold = [asked_of_rank(site, 0, prompt) for prompt in prompts]
        num_chunks = sum(len(prompt) // CHUNK for prompt in prompts)
        eventually(
            lambda: site.node.status()["counters"]["stored_objects_total"] >= num_chunks, "stored"
        )
        assert [asked_of_rank(site, 1, prompt) for prompt in prompts] == cold
        eventually(lambda: len(site.records()) == 4, "four records")
        loaded = [record["loaded_tokens"] for record in site.records()]
        assert loaded == [0, 0, *(whole_chunks(len(prompt)) for prompt in prompts)]
        site.check()
