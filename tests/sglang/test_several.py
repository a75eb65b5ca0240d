"""Several SGLangs on one node that the first of them starts, several requests at once, and whose
KV is whose."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.plain import Texts
from tests.sglang.children import Answer, Server
from tests.sglang.place import ADMIN, Place, await_stored, eventually, pages

FLOAT32 = {"dtype": "float32"}
LENGTHS = (300, 700, 1100, 500, 900, 129)


@pytest.fixture(scope="module")
def place(tiny_llama: Path) -> Iterator[Place]:
    # What of several that ask for the same nobody reads is held for so long.
    with Place(tiny_llama, {"deadlines.load": "2s"}, on_demand=True) as place:
        place.server(FLOAT32).wait()
        eventually(lambda: "attached to node" in place.servers[0].log, "a node on demand")
        yield place


@pytest.fixture
def server(place: Place) -> Iterator[Server]:
    server = place.servers[0]
    server.flush()
    yield server
    assert "Traceback" not in server.said
    place.check()


@pytest.fixture(scope="module")
def second(place: Place) -> Server:
    """Another one on the same node, whose storage may be exchanged."""
    return place.server({**FLOAT32, **ADMIN})


def alike(ones: list[Answer], others: list[Answer]) -> None:
    """In float32 another cut of a batch changes the last digits only."""
    for one, other in zip(ones, others, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def stored(place: Place, server: Server, prompt: list[int], **more: Any) -> Answer:
    """The answer of a prompt; returns when all that was computed for it is stored."""
    with await_stored(place.node, pages(len(prompt) + 8)):
        answer = server.ask(prompt, **more)
    assert answer.cached == 0
    return answer


def test_requests_at_once_all_hit(place: Place, server: Server, texts: Texts) -> None:
    prompts = texts.of(*LENGTHS)
    with await_stored(place.node, sum(pages(len(prompt) + 8) for prompt in prompts)):
        first = server.ask_all(prompts)
    server.flush()
    loaded = server.ask_all(prompts)
    assert [one.loaded for one in loaded] == [pages(len(prompt)) for prompt in prompts]
    alike(loaded, first)


def test_the_same_request_many_times_at_once(place: Place, server: Server, texts: Texts) -> None:
    (prompt,) = texts.of(1100)
    first = stored(place, server, prompt)
    server.flush()
    loaded = server.ask_all([prompt] * 6)
    assert [one.cached for one in loaded] == [pages(1100)] * 6
    alike(loaded, [first] * 6)


def test_two_engines_store_for_one_another(
    place: Place, server: Server, second: Server, texts: Texts
) -> None:
    mine, theirs = texts.of(1000, 600)
    first = stored(place, server, mine), stored(place, second, theirs)
    again = second.ask(mine), server.ask(theirs)
    assert [one.loaded for one in again] == [pages(1000), pages(600)]
    alike(list(again), list(first))
    assert "Traceback" not in second.said


@pytest.mark.parametrize("by", ["cache_salt", "extra_key"])
def test_a_salt_keeps_requests_apart(place: Place, server: Server, texts: Texts, by: str) -> None:
    (prompt,) = texts.of(700)
    first = stored(place, server, prompt)
    for name in ("alice", "bob"):
        server.flush()
        salt: dict[str, Any] = {by: name}
        alike([stored(place, server, prompt, **salt)], [first])
        server.flush()
        again = server.ask(prompt, **salt)
        assert again.loaded == pages(700)
        alike([again], [first])


def test_a_tenant_finds_nothing_of_another(
    place: Place, server: Server, second: Server, texts: Texts
) -> None:
    (prompt,) = texts.of(700)
    stored(place, server, prompt)
    place.detach(second)
    place.attach(second, {"tenant": "another"})
    stored(place, second, prompt)
    second.flush()
    assert second.ask(prompt).loaded == pages(700)
    assert "Traceback" not in second.said


def test_what_was_found_and_why_not_is_told(place: Place, server: Server, texts: Texts) -> None:
    begin, rest = texts.of(513, 400)
    stored(place, server, begin)
    server.flush()
    prompt = begin + rest
    assert server.ask(prompt).loaded == pages(513)

    def told() -> dict[str, Any]:
        record: dict[str, Any] = place.node.status()["requests"][-1]
        return record

    eventually(lambda: told()["loaded_tokens"] == pages(513), "a record")
    record = told()
    whole = pages(len(prompt))
    assert record["tokens"] == whole
    assert record["tier_tokens"] == {"host": pages(513)}
    missing = [(one["why"], one["tokens"]) for one in record["reasons"]]
    assert missing == [("never stored", whole - pages(513))]
    (socket,) = place.folder.rglob("*.sock")
    command = [sys.executable, "-m", "kvstrata.cli", "explain", record["request"]]
    ran = subprocess.run(
        [*command, "--node", f"unix:{socket}"], capture_output=True, text=True, check=True
    )
    assert "512 loaded" in ran.stdout
    assert f"{whole - pages(513)} tokens" in ran.stdout
