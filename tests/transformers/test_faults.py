"""A node that is not there, dies, hangs or lies: the answer is the model's own, in bounded time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.engine.plain import Texts
from tests.transformers.place import CHUNK, Place, eventually, greedy, load

from kvstrata.connectors.transformers import attach
from kvstrata.connectors.transformers.stores import MAX_PENDING
from kvstrata.keys import KeyChain
from kvstrata.objects import HEADER_BYTES
from kvstrata.wire.client import offsets_of

NEW = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return load("tiny_gemma3")


@pytest.fixture(autouse=True)
def _detached(model: Any) -> Iterator[None]:
    yield
    assert "generate" not in vars(model)


def test_no_node_is_a_miss_at_once(model: Any, texts: Texts) -> None:
    (prompt,) = texts.of(300)
    cold = greedy(model, prompt, NEW)
    options: dict[str, Any] = {"node": "unix:/nowhere/node.sock", "deadlines.attach": "300ms"}
    with attach(model, **options) as attached:
        for _ in range(2):
            assert greedy(model, prompt, NEW) == cold
            assert attached.last.missed == "no node"
            assert attached.last.load_s < 1
        assert attached.flush()
        assert attached.stats()["errors"] == {"no node": 2, "no node to store to": 2}


def test_a_node_that_dies_and_comes_again(model: Any, own: Place, texts: Texts) -> None:
    (prompt,) = texts.of(300)
    attached = own.attach(model)
    cold = greedy(model, prompt, NEW)
    assert attached.flush()
    assert greedy(model, prompt, NEW) == cold
    assert attached.last.loaded_tokens == 256
    own.kill_node()
    for _ in range(3):
        assert greedy(model, prompt, NEW) == cold
        assert attached.last.loaded_tokens == 0
    own.start_node()

    def hit() -> bool:
        attached.flush()
        assert greedy(model, prompt, NEW) == cold
        return attached.last.loaded_tokens == 256

    eventually(hit, "a hit in the new node")
    own.detach()
    own.check()


def test_a_node_that_hangs(model: Any, own: Place, texts: Texts) -> None:
    (prompt,) = texts.of(300)
    attached = own.attach(model, **{"deadlines.request": "500ms"})
    cold = greedy(model, prompt, NEW)
    assert attached.flush()
    own.stop_still()
    try:
        begun = time.monotonic()
        assert greedy(model, prompt, NEW) == cold
        assert attached.last.missed.startswith("DeadlineExceeded")
        assert 0.5 <= attached.last.load_s < 5
        # Then it is left alone for a while, and costs nothing.
        assert greedy(model, prompt, NEW) == cold
        assert attached.last.missed == "the node was too slow"
        assert attached.last.load_s < 0.1
        assert time.monotonic() - begun < 30
    finally:
        own.go_on()

    def hit() -> bool:
        assert greedy(model, prompt, NEW) == cold
        return attached.last.loaded_tokens == 256

    eventually(hit, "a hit once it goes on")
    own.detach()
    own.check()


def test_a_slot_that_holds_something_else_is_a_miss(model: Any, place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(300)
    attached = place.attach(model)
    cold = greedy(model, prompt, NEW)
    assert attached.flush()
    subject = attached._subject
    assert subject is not None
    kinds = subject.kinds
    described = subject.described()
    assert described is not None
    node = place.node
    keys = KeyChain(node.hello.secret, described.parts.digest(), CHUNK).keys(prompt)
    parts = [kind.part for kind in kinds.each]
    matched = node.match(keys, parts, ["portable"], [k.nbytes for k in kinds.each]).wait(10)
    (slot, *_) = offsets_of(matched.offsets)
    header = node.pool.view(slot, HEADER_BYTES)
    whole = bytes(header)
    try:
        header[64:96] = bytes(32)  # another key; the header's checksum shows it
        assert greedy(model, prompt, NEW) == cold
        assert attached.last.loaded_tokens == 0
        assert attached.last.missed.startswith("CorruptObject")
        assert attached.stats()["errors"] == {"a load failed": 1}
    finally:
        header[:] = whole
        node.release(matched.lease)
    assert greedy(model, prompt, NEW) == cold
    assert attached.last.loaded_tokens == 256


def test_stores_that_pile_up_are_left_out(model: Any, own: Place, texts: Texts) -> None:
    attached = own.attach(model)
    own.stop_still()
    try:
        for prompt in texts.of(*[150] * (MAX_PENDING + 2)):
            attached._quiet_until = time.monotonic() + 60  # this is about stores
            greedy(model, prompt, 1)
        assert attached.stats()["skipped_stores"] >= 1
    finally:
        own.go_on()
    assert attached.flush()
    assert attached.stats()["stored_chunks"] >= MAX_PENDING
    own.detach()
    own.check()


def test_threads_may_generate_at_once(model: Any, place: Place, texts: Texts) -> None:
    prompts = texts.of(300, 301, 302)
    cold = [greedy(model, prompt, NEW) for prompt in prompts]
    attached = place.attach(model)
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(3):
            if greedy(model, prompts[number], NEW) != cold[number]:
                wrong.append(number)
            attached.flush()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert attached.stats()["loaded_tokens"] == 3 * 2 * 256
    assert not attached.stats()["errors"]
