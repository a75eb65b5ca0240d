"""KV of other weights is never served: weights exchanged in place, another model, no plugin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.engine.plain import Texts
from tests.engine.test_hybrid import adapter
from tests.sglang.children import Answer, Server
from tests.sglang.place import ADMIN, Place, await_stored, pages

from kvstrata.testing import models

LENGTH = 700


@pytest.fixture(scope="module")
def other_llama() -> Path:
    """Folder of the same architecture with other weights."""
    return models.tiny_llama(seed=1)


@pytest.fixture(scope="module")
def place(tiny_llama: Path) -> Iterator[Place]:
    with Place(tiny_llama) as place:
        yield place


@pytest.fixture(scope="module")
def right(
    other_llama: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """Plain SGLang with either weights."""
    folder = tmp_path_factory.mktemp("plain")
    first, second = Server(tiny_llama, folder / "a.log"), Server(other_llama, folder / "b.log")
    yield first, second
    first.kill()
    second.kill()


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
    tiny_llama: Path,
    other_llama: Path,
    right: tuple[Server, Server],
    texts: Texts,
) -> None:
    (prompt,) = texts.of(LENGTH)
    first, second = right[0].ask(prompt), right[1].ask(prompt)
    assert first.tokens != second.tokens
    with closing(place.server()) as server:
        assert stored(place, server, prompt)[:2] == first[:2]
        update(server, other_llama)
        assert stored(place, server, prompt)[:2] == second[:2]
        server.flush()
        again = server.ask(prompt)
        assert again.loaded == pages(LENGTH)
        assert again[:2] == second[:2]
        update(server, tiny_llama)
        assert stored(place, server, prompt)[:2] == first[:2]
        assert "Traceback" not in server.said
    place.check()


def test_weights_exchanged_without_a_flush_are_uncached_until_there_is_one(
    place: Place, other_llama: Path, right: tuple[Server, Server], texts: Texts
) -> None:
    prompt, other = texts.of(LENGTH, LENGTH)
    with closing(place.server()) as server:
        stored(place, server, prompt)
        update(server, other_llama, flush_cache=False)
        objects = place.node.status()["counters"]["stored_objects_total"]
        # SGLang's own levels were asked to keep what is of the old weights; ours did not serve it.
        assert server.ask(prompt).loaded == 0
        assert server.ask(other)[:2] == right[1].ask(other)[:2]
        assert "nothing is cached until SGLang's cache is flushed" in server.log
        server.flush()
        assert place.node.status()["counters"]["stored_objects_total"] == objects
        assert stored(place, server, prompt)[:2] == right[1].ask(prompt)[:2]
        server.flush()
        assert server.ask(prompt).loaded == pages(LENGTH)
    place.check()


def test_a_storage_that_is_attached_anew_knows_of_the_new_weights(
    place: Place, other_llama: Path, right: tuple[Server, Server], texts: Texts
) -> None:
    (prompt,) = texts.of(LENGTH)
    with closing(place.server(ADMIN)) as server:
        stored(place, server, prompt)
        place.detach(server)
        update(server, other_llama)
        place.attach(server)
        assert stored(place, server, prompt)[:2] == right[1].ask(prompt)[:2]
        server.flush()
        assert server.ask(prompt).loaded == pages(LENGTH)
        assert "Traceback" not in server.said
    place.check()


def test_other_weights_in_a_folder_of_the_same_name_are_another_model(
    place: Place,
    tiny_llama: Path,
    other_llama: Path,
    right: tuple[Server, Server],
    tmp_path: Path,
    texts: Texts,
) -> None:
    (prompt,) = texts.of(LENGTH)
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    with closing(place.server(model=model)) as server:
        assert stored(place, server, prompt)[:2] == right[0].ask(prompt)[:2]
    shutil.rmtree(model)
    shutil.copytree(other_llama, model)
    with closing(place.server(model=model)) as server:
        assert stored(place, server, prompt)[:2] == right[1].ask(prompt)[:2]
    shutil.rmtree(model)
    elsewhere = shutil.copytree(tiny_llama, tmp_path / "moved")
    with closing(place.server(model=elsewhere)) as server:
        loaded = server.ask(prompt)
        assert loaded.loaded == pages(LENGTH)
        assert loaded[:2] == right[0].ask(prompt)[:2]


def test_without_its_plugin_it_serves_nothing_and_says_why(
    place: Place, right: tuple[Server, Server], texts: Texts
) -> None:
    (prompt,) = texts.of(LENGTH)
    before = place.node.status()["counters"].get("stored_objects_total", 0)
    with closing(place.server(environment={"SGLANG_PLUGINS": "none-such"})) as server:
        for _ in range(2):
            answer = server.ask(prompt)
            assert answer.cached == 0
            assert answer[:2] == right[0].ask(prompt)[:2]
            server.flush()
        assert "its plugin is not active" in server.log
        assert "Traceback" not in server.said
    assert place.node.status()["counters"].get("stored_objects_total", 0) == before


def test_an_adapter_replaced_in_its_folder_is_another(
    place: Place, tiny_llama: Path, tmp_path: Path, texts: Texts
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
        with (
            closing(Server(tiny_llama, tmp_path / f"plain-{seed}.log", options)) as plain,
            closing(place.server(options)) as server,
        ):
            answer = stored(place, server, prompt, lora_path="one")
            assert answer[:2] == plain.ask(prompt, lora_path="one")[:2]
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
