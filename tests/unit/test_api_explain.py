"""Why something is not loaded, over the API: of a request that ended, and of a prompt."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.apis import CHUNK, SPACE, Engine, Rig, prompt
from tests.support.nodes import ORDER, RAW

from kvstrata.control import Client
from kvstrata.control.client import ApiProblem
from kvstrata.heads import heads
from kvstrata.keys import owner_digest
from kvstrata.pagekeys import PageKeys, page_hashes

RECORD = {
    "request": "chat-17-a", "outcome": "hit", "prompt_tokens": 300, "loaded_tokens": 0,
    "reasons": [{"why": "evicted", "tokens": 256, "tier": "disk", "ago_s": 8.0},
                {"why": "not a whole chunk", "tokens": 44}],
}  # fmt: skip


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name))
        with rig.engine() as engine:
            engine.tell()
        yield rig
        rig.close()


@pytest.fixture
def rig(shared: Rig) -> Rig:
    shared.ask("POST", "/v1/clear", {"everything": True})
    return shared


@pytest.fixture
def client(rig: Rig) -> Iterator[Client]:
    with rig.client() as client:
        yield client


def test_what_a_prompt_would_find_and_why_not_more(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(3, 5000))
        engine.client.clear(keys[1:2], ["host"])
        engine.client.clear(keys[2:])
    found = client.explain(tokens=[*prompt(3, 5000), 1, 2, 3])
    assert (found.request, found.record, found.elsewhere) == ("", None, "")
    assert found.tokens == 3 * CHUNK + 3
    assert found.tiers == {"host": CHUNK, "disk": CHUNK}
    cleared, partial = found.reasons
    assert (cleared.why, cleared.tokens) == ("cleared", CHUNK)
    assert cleared.ago_s > 0
    assert cleared.text.startswith(f"{CHUNK} tokens: it was cleared from ")
    assert cleared.advice == "nothing: somebody asked for it"
    assert (partial.why, partial.tokens) == ("not a whole chunk", 3)
    by_keys = client.explain(keys=[key.hex() for key in keys])
    assert (by_keys.tiers, [one.why for one in by_keys.reasons]) == (found.tiers, ["cleared"])
    salted = client.explain(tokens=prompt(3, 5000), salt="s")
    assert salted.tiers == {}
    short = client.explain(tokens=[1, 2])
    assert [(one.why, one.tokens) for one in short.reasons] == [("not a whole chunk", 2)]


def test_another_tenants_tokens_are_told_of_where_that_is_asked(rig: Rig, client: Client) -> None:
    tokens = prompt(2, 9000)
    adapted = replace(SPACE, adapter="lora", tenant="b")
    with rig.engine() as engine:
        engine.tell(adapted, "adapted")
        engine.tell()
        secret = engine.client.hello.secret
        keys = engine.keys(tokens, adapted)
        owner = owner_digest(secret, "b", "")
        begin = heads(secret, tokens, CHUNK)
        engine.client.match(
            keys, [0], [ORDER], [RAW], owner, adapted.digest(), heads=begin
        ).wait(5.0)  # fmt: skip
        engine.store(tokens, adapted)
        here = SPACE.digest().hex()
        (hidden,) = client.explain(tokens=tokens, namespace=here).reasons
        assert (hidden.why, hidden.detail) == ("never stored", "")
        (told,) = client.explain(tokens=tokens, namespace=here, across_tenants=True).reasons
    assert (told.why, told.tokens) == ("another namespace", 2 * CHUNK)
    assert told.detail == "adapter, tenant"
    assert "under another adapter and another tenant" in told.text


def test_what_became_of_a_request(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        engine.client.record(RECORD)
        engine.client.record({"request": "chat-18-b", "outcome": "bypassed"})
        engine.client.status()
    found = client.explain("chat-17")
    assert (found.request, found.tokens, found.tiers) == ("chat-17-a", 300, {})
    evicted, partial = found.reasons
    assert (evicted.why, evicted.tokens, evicted.tier, evicted.ago_s) == ("evicted", 256, "disk", 8)
    assert evicted.text == "256 tokens: it was evicted from disk to make room 8 s before."
    assert evicted.advice == "raise disk.capacity, add a slower tier, or pin what must stay"
    assert (partial.why, partial.tokens) == ("not a whole chunk", 44)
    assert found.record == RECORD
    assert client.explain("chat-18-b").reasons == []
    with pytest.raises(ApiProblem, match="no record of a request 'nobody'") as caught:
        client.explain("nobody")
    assert caught.value.problem.status == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body.tokens"),
        ({"request": ""}, "body.request"),
        ({"request": "a", "tokens": [1]}, "body.tokens"),
        ({"request": "a", "salt": "s"}, "body.salt"),
        ({"tokens": [1], "text": "a"}, "body.text"),
        ({"tokens": [1], "model": "nobody's"}, "body.model"),
    ],
)
def test_a_wrong_field_is_named(rig: Rig, body: Any, field: str) -> None:
    problem = rig.ask("POST", "/v1/explain", body).problem
    assert (problem["status"], problem["field"]) == (422, field)


def test_what_an_earlier_secret_stored_is_found_and_cleared() -> None:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        old = bytes(range(32))
        secret = Path(name) / "secret"
        secret.write_bytes(bytes(32) + old)
        secret.chmod(0o600)
        rig = Rig(Path(name))
        with rig.client() as client, rig.engine() as engine:
            engine.tell()
            Engine(engine.client, old).store(prompt(2))
            assert client.explain(tokens=prompt(2)).tiers == {"host": 2 * CHUNK}
            assert client.clear(tenant="nobody").objects == 0
            assert client.clear(tenant="a").objects == 4
            (reason,) = client.explain(tokens=prompt(2)).reasons
            assert reason.tokens == 2 * CHUNK
        rig.close()


def test_a_namespace_of_pages_is_asked_by_the_keys_of_pages() -> None:
    space, tokens = replace(SPACE, pages=True), prompt(3, 7000)
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name))
        try:
            with rig.engine() as engine, rig.client() as client:
                digest = engine.tell(space)
                keys = engine.store(tokens[: 2 * CHUNK], space)
                assert keys == PageKeys(engine.secret, space.digest()).of(
                    page_hashes(tokens[: 2 * CHUNK], CHUNK)
                )
                assert client.explain(tokens=tokens).tiers == {"host": 2 * CHUNK}
                assert client.lookup(tokens=tokens).leading_tokens == 2 * CHUNK
                (told,) = client.namespaces().namespaces
                assert (told.digest, told.pages) == (digest, True)
        finally:
            rig.close()
