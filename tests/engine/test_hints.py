"""Hints as a client sends them: through vLLM's OpenAI server, each seen in the request's record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engine import CHUNK, Prompt
from tests.engine.place import eventually
from tests.engine.plain import Texts
from tests.engine.servers import Site

from kvstrata.testing.serving import MODEL
from kvstrata.wire.operator import Operator

pytestmark = pytest.mark.engine

LENGTH = 3 * CHUNK + 20


class Client(Site):
    """An application, and what it talks to."""

    def say(self, prompt: Prompt, **hints: Any) -> dict[str, Any]:
        """The record of a request of whose prompt vLLM itself has nothing."""
        self.server.reset_prefix_cache()
        before = {record["request"] for record in self.records()}
        self.server.tokens(prompt, 1, kv_transfer_params={"kvstrata": hints})
        new: list[dict[str, Any]] = []

        def told() -> bool:
            new[:] = [one for one in self.records() if one["request"] not in before]
            return len(new) == 1 and not self.node.status()["leases"]["reservations"]

        eventually(told, "the request has left a record")
        self.node.flush()
        return new[0]


@pytest.fixture(scope="module")
def client(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    disk = {"disk.path": str(tmp_path_factory.mktemp("disk")), "disk.capacity": "64MiB"}
    with Client(tiny_llama, {"hints": "all", **disk}) as site:
        site.server.wait()
        yield site
        site.server.kill()
        site.stop_node()


def test_each_hint_does_what_it_says(client: Client, texts: Texts) -> None:
    one, other, third = texts.of(LENGTH, LENGTH, LENGTH)

    record = client.say(one, max_store_tokens=2 * CHUNK, session="chat 7", pin=3600)
    assert record["hints"] == {"max_store_tokens": 2 * CHUNK, "session": "chat 7", "pin": 3600}
    (pin,) = Operator(client.node).pins()
    assert (pin.name, pin.num_chunks, pin.num_kept) == ("session chat 7", 2, 2)
    assert (record["stored_chunks"], record["loaded_tokens"]) == (2, 0)

    said: list[tuple[dict[str, Any], int]] = [
        ({"max_load_tokens": CHUNK + 1, "store": False}, CHUNK),
        ({"load": False, "store": False}, 0),
        ({"priority": 99, "pin": "for ever", "nonsense": 1, "store": False}, 2 * CHUNK),
    ]
    for hints, loaded in said:
        record = client.say(one, **hints)
        assert (record["stored_chunks"], record["loaded_tokens"]) == (0, loaded)
    assert record["hints"] == {"store": False}
    assert record["hints_refused"] == {
        "priority": "Expected `int` <= 3",
        "pin": "Expected `int`, got `str`",
        "nonsense": "no such hint",
    }

    used: list[tuple[Prompt, dict[str, Any], int]] = [
        (other, {"tiers": ["disk"], "priority": 2}, 3 * CHUNK),
        (third, {"tiers": ["host"]}, 0),
    ]
    for prompt, hints, loaded in used:
        assert client.say(prompt, **hints)["stored_chunks"] == 3
        client.node.flush()  # what waits to be written goes with what is cleared
        client.node.clear(tiers=["host"])
        assert client.say(prompt, store=False)["loaded_tokens"] == loaded

    client.check()


def test_the_openai_client_sends_them_too(client: Client, texts: Texts) -> None:
    from openai import OpenAI

    (prompt,) = texts.of(LENGTH)
    ours = OpenAI(base_url=f"{client.server.url}/v1", api_key="none", max_retries=0)
    try:
        ours.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=1,
            extra_body={"kv_transfer_params": {"kvstrata": {"session": "chat 9"}}},
        )
    finally:
        ours.close()

    def told() -> bool:
        return any(one.get("hints") == {"session": "chat 9"} for one in client.records())

    eventually(told, "the record has the hint")
