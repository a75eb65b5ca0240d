"""KV of other weights is never served: weights exchanged in place, another model, no plugin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.engine.plain import Texts
from tests.engine.test_hybrid import adapter
from tests.sglang.children import Answer, Server
from tests.sglang.place import ADMIN, Place, await_stored, pages

from kvstrata.testing import models

LENGTH = 400


@pytest.fixture(scope="module")
def other_llama() -> Path:
    """Folder of the same architecture with other weights."""
    return models.tiny_llama(seed=1)


@pytest.fixture(scope="module")
def place(tiny_llama: Path) -> Iterator[Place]:
    with Place(tiny_llama) as place:
        place.server(ADMIN)
        yield place


class Right(NamedTuple):
    """A prompt, and what plain SGLang answers with either weights."""

    prompt: list[int]
    first: Answer
    second: Answer


@pytest.fixture(scope="module")
def rights(
    plain: Server, tiny_llama: Path, other_llama: Path, tokenizer: models.Tokenizer
) -> Iterator[Right]:
    """As many as the tests here take."""
    prompts = Texts(tokenizer, "weights").of(*[LENGTH] * 5)
    first = [plain.ask(prompt) for prompt in prompts]
    update(plain, other_llama)
    try:
        second = [plain.ask(prompt) for prompt in prompts]
    finally:
        update(plain, tiny_llama)
    assert all(one.tokens != other.tokens for one, other in zip(first, second, strict=True))
    return map(Right, prompts, first, second)


@pytest.fixture
def right(rights: Iterator[Right]) -> Right:
    """One that no other test asks about."""
    return next(rights)


@pytest.fixture(scope="module")
def begun(place: Place, rights: Iterator[Right]) -> Right:
    """One that the place's SGLang stored with the weights that it started with."""
    right = next(rights)
    assert stored(place, place.servers[0], right.prompt)[:2] == right.first[:2]
    return right


@pytest.fixture
def server(place: Place, begun: Right, tiny_llama: Path) -> Iterator[Server]:
    """The place's SGLang, which has been given its first weights once more."""
    server = place.servers[0]
    update(server, tiny_llama)
    yield server
    assert "Traceback" not in server.said
    place.check()


def update(server: Server, model: Path, **more: object) -> None:
    told = server.post("/update_weights_from_disk", {"model_path": str(model), **more})
    assert json.loads(told)["success"]


def stored(place: Place, server: Server, prompt: list[int], **more: Any) -> Answer:
    """The answer of a prompt of which nothing is found; returns when it is stored."""
    with await_stored(place.node, pages(len(prompt) + 8)):
        answer = server.ask(prompt, **more)
    assert answer.cached == 0
    return answer


def test_new_weights_find_nothing_of_the_old(
    place: Place,
    server: Server,
    tiny_llama: Path,
    other_llama: Path,
    begun: Right,
    right: Right,
) -> None:
    assert stored(place, server, right.prompt)[:2] == right.first[:2]
    update(server, other_llama)
    for one in (right, begun):
        assert stored(place, server, one.prompt)[:2] == one.second[:2]
    server.flush()
    again = server.ask(right.prompt)
    assert again.loaded == pages(LENGTH)
    assert again[:2] == right.second[:2]
    update(server, tiny_llama)
    assert stored(place, server, right.prompt)[:2] == right.first[:2]


def test_weights_exchanged_without_a_flush_are_uncached_until_there_is_one(
    place: Place, server: Server, other_llama: Path, rights: Iterator[Right]
) -> None:
    right, other = next(rights), next(rights)
    stored(place, server, right.prompt)
    said = len(server.log)
    update(server, other_llama, flush_cache=False)
    objects = place.node.status()["counters"]["stored_objects_total"]
    # SGLang's own levels were asked to keep what is of the old weights; ours did not serve it.
    assert server.ask(right.prompt).loaded == 0
    assert server.ask(other.prompt)[:2] == other.second[:2]
    assert "nothing is cached until SGLang's cache is flushed" in server.log[said:]
    server.flush()
    assert place.node.status()["counters"]["stored_objects_total"] == objects
    assert stored(place, server, right.prompt)[:2] == right.second[:2]
    server.flush()
    assert server.ask(right.prompt).loaded == pages(LENGTH)


def test_a_storage_that_is_attached_anew_knows_of_the_new_weights(
    place: Place, server: Server, other_llama: Path, begun: Right, right: Right
) -> None:
    stored(place, server, right.prompt)
    place.detach(server)
    update(server, other_llama)
    place.attach(server)
    # One that knew nothing would ask for those of the start, which `begun` was stored with.
    for one in (begun, right):
        assert stored(place, server, one.prompt)[:2] == one.second[:2]
    server.flush()
    assert server.ask(right.prompt).loaded == pages(LENGTH)


def test_other_weights_in_a_folder_of_the_same_name_are_another_model(
    place: Place, tiny_llama: Path, other_llama: Path, begun: Right, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    with closing(place.server(ADMIN, model=model)) as server:
        loaded = server.ask(begun.prompt)
        assert loaded.loaded == pages(LENGTH), "the same model, in another folder"
        assert loaded[:2] == begun.first[:2]
        place.detach(server)
        shutil.rmtree(model)
        shutil.copytree(other_llama, model)
        # It goes on with what it has loaded, which is in no folder any more.
        place.attach(server)
        server.flush()
        objects = place.node.status()["counters"]["stored_objects_total"]
        answer = server.ask(begun.prompt)
        assert (answer.cached, answer[:2]) == (0, begun.first[:2])
        assert "has changed since this engine loaded it" in server.log
        assert place.node.status()["counters"]["stored_objects_total"] == objects
        assert "Traceback" not in server.said
    with closing(place.server(model=model)) as server:
        assert stored(place, server, begun.prompt)[:2] == begun.second[:2]
        assert "Traceback" not in server.said


def test_without_its_plugin_it_serves_nothing_and_says_why(place: Place, begun: Right) -> None:
    before = place.node.status()["counters"].get("stored_objects_total", 0)
    with closing(place.server(environment={"SGLANG_PLUGINS": "none-such"})) as server:
        for _ in range(2):
            answer = server.ask(begun.prompt)
            assert answer.cached == 0
            assert answer[:2] == begun.first[:2]
            server.flush()
        assert "its plugin is not active" in server.log
        assert "Traceback" not in server.said
    assert place.node.status()["counters"].get("stored_objects_total", 0) == before


def test_an_adapter_replaced_in_its_folder_is_another(
    place: Place, tmp_path: Path, texts: Texts
) -> None:
    (prompt,) = texts.of(LENGTH)
    folder = tmp_path / "adapter"
    options = {
        "enable-lora": True,
        "lora-paths": f"one={folder}",
        "lora-backend": "torch_native",
    }
    answers = []
    for seed in (1, 2):
        shutil.rmtree(folder, ignore_errors=True)
        # SGLang takes none that leaves queries out.
        adapter(folder, seed, queries=True)
        with closing(place.server(options)) as server:
            answer = stored(place, server, prompt, lora_path="one")
            base = stored(place, server, prompt)
            assert base.tokens != answer.tokens
            server.flush()
            again = server.ask(prompt, lora_path="one")
            assert again.loaded == pages(LENGTH)
            assert again[:2] == answer[:2]
            assert "Traceback" not in server.said
        answers.append(answer.tokens)
    assert answers[0] != answers[1]
    place.check()
