"""The HTTP API's verbs against a real node: what they answer, and what they refuse."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp
from tests.support.apis import CHUNK, MODEL, SPACE, Rig, prompt

import kvstrata
from kvstrata.config import load_config
from kvstrata.control.app import build
from kvstrata.control.base import MAX_TOKENS
from kvstrata.errors import TierUnavailable
from kvstrata.observe.rendering import CONTENT_TYPE
from kvstrata.wire import protocol as p


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name))
        yield rig
        rig.close()


@pytest.fixture
def rig(shared: Rig) -> Iterator[Rig]:
    """The same API for every test, and a node that holds nothing."""
    assert shared.node is not None
    shared.ask("POST", "/v1/clear", {"everything": True})
    yield shared
    shared.node.check_integrity()


def test_who_is_there(rig: Rig) -> None:
    assert rig.node is not None
    assert rig.ask("GET", "/v1/health").body == {"status": "ok"}
    ready = rig.ask("GET", "/v1/ready")
    assert (ready.status, set(ready.body["tiers"])) == (200, {"host", "disk"})
    version = rig.ask("GET", "/v1/version").body
    assert version["release"] == version["node_release"] == kvstrata.__version__
    assert version["protocol"] == p.PROTOCOL_VERSION


def test_the_status_is_all_that_the_node_tells(rig: Rig) -> None:
    with rig.engine() as engine:
        state = engine.client.status()
    told = rig.ask("GET", "/v1/status").body
    assert set(told) == set(state)
    assert told["host"]["capacity_bytes"] == 16 << 20
    assert told["tiers"][0]["capacity_bytes"] == 64 << 20, "fields beyond the model are not lost"


def test_the_metrics_are_what_prometheus_reads(rig: Rig) -> None:
    with urllib.request.urlopen(f"{rig.url}/metrics", timeout=60) as answer:
        assert answer.headers["content-type"] == CONTENT_TYPE
        families = {one.name: one for one in text_string_to_metric_families(answer.read().decode())}
    (sample,) = families["kvstrata_host_capacity_bytes"].samples
    assert sample.value == 16 << 20


def test_a_lookup_says_how_much_would_hit_and_where(rig: Rig) -> None:
    tokens = prompt(6)
    with rig.engine() as engine:
        digest = engine.tell()
        keys = engine.store(tokens[: 4 * CHUNK])
        engine.client.clear(keys[2:3], ["host"])
        engine.client.clear(keys[3:4])
        more = engine.store([*prompt(2), *prompt(1, 1000)])
        engine.client.clear(more[2:])
    body = {"tokens": [*tokens, 1, 2, 3], "model": MODEL}
    found = rig.ask("POST", "/v1/lookup", body).body
    assert found == {
        "namespace": digest,
        "model": MODEL,
        "tokens": 6 * CHUNK + 3,
        "chunk_tokens": CHUNK,
        "chunks": 6,
        "leading_tokens": 3 * CHUNK,
        "leading_chunks": 3,
        "tiers": {"host": 2, "disk": 1},
        "runs": [
            {"first": 0, "count": 2, "tier": "host"},
            {"first": 2, "count": 1, "tier": "disk"},
            {"first": 3, "count": 3, "tier": None},
        ],
    }
    by_keys = {"keys": [key.hex() for key in keys], "namespace": digest}
    found = rig.ask("POST", "/v1/lookup", by_keys).body
    assert (found["leading_chunks"], found["chunks"], found["tokens"]) == (3, 4, 4 * CHUNK)


def test_what_is_behind_a_gap_is_told_and_does_not_count(rig: Rig) -> None:
    with rig.engine() as engine:
        engine.tell()
        keys = engine.store(prompt(3))
        engine.client.clear(keys[1:2])
    found = rig.ask("POST", "/v1/lookup", {"tokens": prompt(3), "model": MODEL}).body
    assert (found["leading_chunks"], found["tiers"]) == (1, {"host": 1})
    assert [run["tier"] for run in found["runs"]] == ["host", None, "host"]


def test_a_salt_has_keys_of_its_own(rig: Rig) -> None:
    with rig.engine() as engine:
        engine.tell()
        engine.store(prompt(2), salt="ada")
    for salt, leading in [("ada", 2), ("", 0), ("bob", 0)]:
        body = {"tokens": prompt(2), "salt": salt, "model": MODEL}
        assert rig.ask("POST", "/v1/lookup", body).body["leading_chunks"] == leading


def test_a_chunk_counts_when_every_rank_has_its_part(rig: Rig) -> None:
    space = replace(SPACE, tensor_parallel=2)
    with rig.engine() as engine:
        engine.tell(space, "two ranks", objects=[0, 1])
        engine.store(prompt(2), space)
        body = {"tokens": prompt(2), "model": "two ranks"}
        assert rig.ask("POST", "/v1/lookup", body).body["leading_chunks"] == 0
        engine.store(prompt(1), space, part=1)
        assert rig.ask("POST", "/v1/lookup", body).body["leading_chunks"] == 1


def test_which_model_is_meant(rig: Rig) -> None:
    other = replace(SPACE, adapter="lora")
    with rig.engine() as engine:
        engine.tell(other, "with an adapter")
        engine.tell(replace(other, model="f2"), "with an adapter")
        digest = engine.tell()
    listed = rig.ask("GET", "/v1/namespaces").body["namespaces"]
    assert listed[-1]["digest"] == digest
    assert listed[-1]["tenant"] == "a"
    assert listed[-1]["details"] == {"name": MODEL, "weights": "w"}
    refused: list[tuple[dict[str, Any], str, str]] = [
        ({"model": "nobody's"}, "body.model", f"knows .*{MODEL}"),
        ({}, "body.namespace", "several are meant"),
        ({"model": "with an adapter"}, "body.namespace", other.digest().hex()),
        ({"namespace": "ab" * 32}, "body.namespace", "no engine told"),
    ]
    for named, field, words in refused:
        problem = rig.ask("POST", "/v1/lookup", {"tokens": [1], **named}).problem
        assert (problem["status"], problem["field"]) == (422, field)
        assert re.search(words, problem["detail"])
    named = {"tokens": [1], "namespace": other.digest().hex()}
    assert rig.ask("POST", "/v1/lookup", named).body["chunks"] == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body.tokens"),
        ({"tokens": [1], "text": "a"}, "body.text"),
        ({"tokens": [1, -1]}, "body.tokens.1"),
        ({"tokens": [1, 1 << 31]}, "body.tokens.1"),
        ({"tokens": ["1"]}, "body.tokens.0"),
        ({"tokens": [True]}, "body.tokens.0"),
        ({"keys": ["zz"]}, "body.keys.0"),
        ({"keys": [], "salt": "s"}, "body.salt"),
        ({"token": [1]}, "body.token"),
        ({f"field {number}": 1 for number in range(65)}, "body"),
        ([1], "body"),
    ],
)
def test_a_wrong_field_is_named(rig: Rig, body: Any, field: str) -> None:
    problem = rig.ask("POST", "/v1/lookup", body).problem
    assert problem["status"] == 422
    assert problem["field"] == problem["errors"][0]["field"] == field
    assert problem["detail"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("lookup", {"tokens": [-1] * 100_000}),
        ("lookup", {"keys": ["a"] * 100_000}),
        ("lookup", {"messages": [1] * 100_000}),
        ("clear", {"everything": True, "tiers": [1] * 100_000}),
        ("route", {"nodes": {"a": 0}, "tokens": [-1] * 100_000}),
        ("route", {"nodes": {f"{number}": -1 for number in range(100_000)}, "tokens": [1]}),
        ("warm", {"url": "http://a", "model": "m", "prompts": [[-1] * 100_000] * 4}),
        ("inspect", {"tier": "host", "key": "ab" * 32, "orders": [1] * 100_000}),
    ],
)
def test_of_many_wrong_elements_one_is_told(rig: Rig, path: str, body: Any) -> None:
    problem = rig.ask("POST", f"/v1/{path}", body).problem
    assert problem["status"] == 422
    assert len(problem["errors"]) <= 2


def test_a_prompt_has_so_many_tokens_at_most(rig: Rig) -> None:
    body = b'{"tokens": [' + b"1," * MAX_TOKENS + b"1]}"
    kind = {"Content-Type": "application/json"}
    assert rig.ask("POST", "/v1/lookup", body, kind).problem["field"] == "body.tokens"


def test_nothing_given_is_repeated_in_a_problem(rig: Rig) -> None:
    problem = rig.ask("POST", "/v1/lookup", {"tokens": ["a secret"], "hidden": "secret"}).problem
    assert "secret" not in str(problem)


def test_what_is_no_json_and_what_is_not_there(rig: Rig) -> None:
    kind = {"Content-Type": "application/json"}
    assert rig.ask("POST", "/v1/lookup", b"{", kind).problem["status"] == 400
    assert rig.ask("POST", "/v1/lookup", b"\xff", kind).problem["status"] in (400, 422)
    assert rig.ask("GET", "/v1/nothing").problem["status"] == 404
    assert rig.ask("GET", "/v1/health/").problem["status"] == 404
    refused = rig.ask("DELETE", "/v1/lookup")
    assert (refused.problem["status"], refused.headers["allow"]) == (405, "POST")
    for kind in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}):
        assert rig.ask("POST", "/v1/lookup", b'{"tokens": []}', kind).problem["status"] == 415
    assert rig.ask("GET", "/v1/health", {"a": 1}).problem["status"] == 400


def test_clear_forgets_in_the_tiers_that_are_named(rig: Rig) -> None:
    with rig.engine() as engine:
        engine.tell()
        keys = engine.store(prompt(4))
        where = engine.client.lookup
        body: dict[str, Any] = {"keys": [keys[0].hex(), keys[1].hex()], "tiers": ["host"]}
        assert rig.ask("POST", "/v1/clear", body).body == {"objects": 2}
        assert list(where(keys, [0])) == [1, 1, 0, 0]
        assert rig.ask("POST", "/v1/clear", body).body == {"objects": 0}, "it can be repeated"
        rig.ask("POST", "/v1/clear", {"keys": [keys[0].hex()]})
        assert list(where(keys, [0])) == [255, 1, 0, 0]
        rig.ask("POST", "/v1/clear", {"everything": True, "tiers": ["disk"]})
        assert list(where(keys, [0])) == [255, 255, 0, 0]
        assert rig.ask("POST", "/v1/clear", {"everything": True}).body == {"objects": 2}
        assert list(where(keys, [0])) == [255] * 4


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body.everything"),
        ({"everything": False}, "body.everything"),
        ({"everything": True, "keys": []}, "body.everything"),
        ({"everything": True, "tiers": []}, "body.tiers"),
        ({"before": 1e-10}, "body.before"),
        ({"before": 5e-324}, "body.before"),
        ({"everything": True, "tiers": ["host", "tape"]}, "body.tiers.1"),
    ],
)
def test_a_clear_that_says_too_little_clears_nothing(
    rig: Rig, body: dict[str, Any], field: str
) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(1))
        problem = rig.ask("POST", "/v1/clear", body).problem
        assert (problem["status"], problem["field"]) == (422, field)
        assert list(engine.client.lookup(keys, [0])) == [0]


def test_a_flush_waits_for_the_disk(rig: Rig) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(3))
        assert rig.ask("POST", "/v1/flush").body == {"status": "ok"}
        engine.client.clear(keys, ["host"])
        assert list(engine.client.lookup(keys, [0])) == [1, 1, 1]


def test_requests_come_in_pages(rig: Rig) -> None:
    with rig.engine() as engine:
        for number in range(7):
            engine.client.record({"request": f"r{number}", "outcome": "hit", "miss": ""})
        engine.client.status()
    seen, before = [], 0
    while True:
        page = rig.ask("GET", f"/v1/requests?limit=3&before={before}").body
        assert len(page["records"]) <= 3
        seen += [one["request"] for one in page["records"]]
        if not (before := page["next"]):
            break
    assert seen == [f"r{number}" for number in reversed(range(7))]
    assert rig.ask("GET", "/v1/requests?limit=1").body["records"][0]["miss"] == ""
    for query, field in [("limit=0", "limit"), ("limit=257", "limit"), ("before=-1", "before")]:
        problem = rig.ask("GET", f"/v1/requests?{query}").problem
        assert (problem["status"], problem["field"]) == (422, f"query.{field}")


def test_a_node_that_refuses_is_told_in_its_words(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rig.node is not None

    def off(client: object, message: p.Clear) -> None:
        raise TierUnavailable("the disk is off")

    monkeypatch.setitem(rig.node.node._handlers, p.Clear, off)
    answer = rig.ask("POST", "/v1/clear", {"everything": True})
    assert (answer.problem["status"], answer.problem["kind"]) == (503, "TierUnavailable")
    assert answer.problem["detail"] == "the disk is off"
    assert answer.headers["retry-after"]
    monkeypatch.undo()


@given(st.lists(st.booleans(), max_size=12))
def test_leading_chunks_are_those_before_the_first_gap(shared: Rig, there: list[bool]) -> None:
    tokens = prompt(len(there), 5000)
    with shared.engine() as engine:
        engine.tell()
        if tokens:
            keys = engine.store(tokens)
            engine.client.clear([key for key, one in zip(keys, there, strict=True) if not one])
    found = shared.ask("POST", "/v1/lookup", {"tokens": tokens, "model": MODEL}).body
    leading = there.index(False) if False in there else len(there)
    assert found["leading_chunks"] == leading
    assert sum(found["tiers"].values()) == leading
    shown = [run["tier"] is not None for run in found["runs"] for _ in range(run["count"])]
    assert shown == there


def test_the_description_is_rendered_once() -> None:
    guarded, app = build(load_config(environ={}, overrides={"host.capacity": "1MiB"}))
    told = json.dumps(app.openapi())
    schema = app.openapi_schema
    assert schema is not None
    schema["paths"] = {}  # which a rendering for each request would show
    answers = [asked(guarded, "/v1/openapi.json") for _ in range(2)]
    assert [json.loads(body) for _, body in answers] == [json.loads(told)] * 2
    assert [status for status, _ in answers] == [200, 200]


def asked(app: ASGIApp, path: str) -> tuple[int, bytes]:
    """A GET of an application without a server."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path)

    answer = asyncio.run(ask())
    return answer.status_code, answer.content
