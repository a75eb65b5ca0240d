"""What is stored once is loaded whole and right: after a flush, and from the disk.

Every answer is compared with that of a plain SGLang that goes on from as many tokens of its own
cache, token by token and by the log-probability of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.engine.plain import Texts
from tests.sglang.children import PAGE, Answer, Server
from tests.sglang.place import Place, await_stored, disk, loaded_from, pages

from kvstrata.testing.workplace import wait_ready

NEW = PAGE + 2
"""Tokens of an answer that ends another page than it began."""
LENGTHS = (127, 128, 129, 130, 255, 256, 257, 300, 385, 511, 640, 1000, 1500)


@pytest.fixture(scope="module")
def place(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tiny_llama, disk(tmp_path_factory.mktemp("disk"))) as place:
        place.server()
        yield place


@pytest.fixture
def server(place: Place) -> Iterator[Server]:
    """The place's first SGLang."""
    server = place.servers[0]
    server.wait()
    yield server
    place.check()
    assert "Traceback" not in server.said


def cold(place: Place, server: Server, plain: Server, prompts: Sequence[list[int]]) -> list[Answer]:
    """Have prompts answered that nobody has asked before; returns when they are stored.

    Returns:
        What plain SGLang says to each when it is asked again, out of its own cache.
    """
    with await_stored(place.node, sum(pages(len(prompt) + 8) for prompt in prompts)):
        answers = [server.ask(prompt) for prompt in prompts]
    for answer, prompt in zip(answers, prompts, strict=True):
        assert (answer.cached, answer.loaded) == (0, 0)
        assert answer.like(plain.ask(prompt)), len(prompt)
    return [plain.ask(prompt) for prompt in prompts]


def all_hit(server: Server, prompts: Sequence[list[int]], own: Sequence[Answer]) -> None:
    """Each prompt's whole pages come from the node, and the answer is that of an own hit."""
    for prompt, right in zip(prompts, own, strict=True):
        loaded = server.ask(prompt)
        assert loaded.loaded == loaded.cached == right.cached == pages(len(prompt))
        assert loaded.like(right), len(prompt)


def test_every_whole_page_comes_back_after_a_flush(
    place: Place, server: Server, plain: Server, texts: Texts
) -> None:
    prompts = texts.of(*LENGTHS)
    own = cold(place, server, plain, prompts)
    for _ in range(2):
        server.flush()
        all_hit(server, prompts, own)


def test_what_was_answered_is_stored_too_and_gone_on_from(
    place: Place, server: Server, plain: Server, texts: Texts
) -> None:
    questions = texts.of(300, 140, 90)
    chat: list[int] = []
    for question in questions:
        chat += question
        server.flush()
        before = pages(len(chat) - len(question))
        with await_stored(place.node, pages(len(chat) + NEW) - before):
            answer = server.ask(chat, NEW)
        assert answer.loaded == answer.cached == before
        # Plain SGLang goes on from its own cache, so that the same tokens are computed at once.
        right = plain.ask(chat, NEW)
        assert right.cached == before
        assert answer.like(right)
        chat += answer.tokens


def test_a_common_beginning_is_loaded_and_the_rest_computed(
    place: Place, server: Server, texts: Texts
) -> None:
    begin, *ends = texts.of(900, 130, 300, 700)
    prompts = [begin + end for end in ends]
    common = pages(len(begin) + 1)
    with await_stored(place.node, pages(len(begin) + 8)):
        server.ask(begin)
    for prompt in prompts:
        server.flush()
        with await_stored(place.node, pages(len(prompt) + 8) - common):
            answer = server.ask(prompt)
        assert answer.loaded == answer.cached == common
        server.flush()
        again = server.ask(prompt)
        assert again.loaded == pages(len(prompt))
        assert again.tokens == answer.tokens


def test_what_sglang_has_itself_is_not_loaded_again(
    place: Place, server: Server, plain: Server, texts: Texts
) -> None:
    begin, rest = texts.of(512, 700)
    (own,) = cold(place, server, plain, [begin + rest])
    server.flush()
    assert server.ask(begin + rest[:1]).loaded == 512
    upon = server.ask(begin + rest)
    assert (upon.cached, upon.loaded) == (pages(1212), pages(1212) - 512)
    assert upon.like(own)


def test_another_node_goes_on(place: Place, server: Server, plain: Server, texts: Texts) -> None:
    prompts = texts.of(257, 640, 1500)
    (another,) = texts.of(300)
    cold(place, server, plain, [another])
    own = cold(place, server, plain, prompts)
    place.node.flush()
    place.stop_node()
    place.start_node()
    wait_ready(place.node)
    place.await_hits(server)
    server.ask(another)  # a node's first read is its slowest, and SGLang waits for none for long
    server.flush()
    all_hit(server, prompts, own)
    assert loaded_from(place.node)["disk"] >= pages(257) + pages(640) + pages(1500)
