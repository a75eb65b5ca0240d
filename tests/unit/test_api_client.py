"""The client against the API's own description, and against a real API."""

from __future__ import annotations

import inspect
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.apis import CHUNK, MODEL, Rig, prompt

from kvstrata import control, errors
from kvstrata.config import load_config
from kvstrata.control import Client, inprocess, problems
from kvstrata.control.app import build
from kvstrata.control.client import ApiProblem, Prompting
from kvstrata.errors import (
    DeadlineExceeded,
    Incompatible,
    NodeUnavailable,
    TierUnavailable,
    UsageError,
)

SCHEMA = build(load_config(environ={}, overrides={"host.capacity": "1MiB"}))[1].openapi()
OPERATIONS = {
    operation["operationId"]: (verb, path, operation)
    for path, verbs in SCHEMA["paths"].items()
    for verb, operation in verbs.items()
}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name))
        yield rig
        rig.close()


def schema_of(operation: dict[str, Any]) -> dict[str, Any]:
    """The schema of what is asked in a body."""
    body = operation.get("requestBody", {"content": {"application/json": {"schema": {}}}})
    schema: dict[str, Any] = body["content"]["application/json"]["schema"]
    if "$ref" in schema:
        return dict(SCHEMA["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    return schema


def test_every_operation_is_a_method_and_the_other_way_round() -> None:
    methods = {name for name, _ in inspect.getmembers(Client, inspect.isfunction)}
    assert {name for name in methods if name[0] != "_"} - {"close"} == set(OPERATIONS)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_method_takes_what_is_asked_and_returns_what_is_told(name: str) -> None:
    _, _, operation = OPERATIONS[name]
    method = getattr(Client, name)
    parameters = dict(inspect.signature(method).parameters)
    parameters.pop("self")
    prompting = parameters.pop("prompt", None)
    body = schema_of(operation)
    fields = dict(body.get("properties", {}))
    needed = set(body.get("required", []))
    for one in operation.get("parameters", []):
        fields[one["name"]] = one["schema"]
        needed |= {one["name"]} if one.get("required") else set()
    if prompting is not None:
        assert fields.keys() >= Prompting.__annotations__.keys()
        fields = {one: kind for one, kind in fields.items() if one not in Prompting.__annotations__}
    assert set(parameters) == set(fields)
    empty = inspect.Parameter.empty
    assert {field for field, one in parameters.items() if one.default is empty} == needed
    for field, one in parameters.items():
        if one.default is not empty:
            default = list(one.default) if isinstance(one.default, tuple) else one.default
            assert default == fields[field].get("default", None), field
    (told,) = [one for code, one in operation["responses"].items() if code.startswith("2")]
    (kind,) = told["content"].values()
    shape = kind["schema"].get("$ref", "/str").rpartition("/")[2]
    assert typing.get_type_hints(method)["return"].__name__ == shape


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_method_asks_for_its_operation(name: str) -> None:
    verb, path, operation = OPERATIONS[name]
    asked: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(500, json={})

    given: dict[str, Any] = {
        "url": "http://e", "model": "m", "prompts": ["p"], "id": "a/../b?c", "keys": ["ab"],
        "tier": "disk", "key": "k", "source": "disk", "target": "host", "peer": "b:1",
        "config": {}, "nodes": {"a": 0}, "name": "n", "ttl_s": 1.0, "nbytes": None,
    }  # fmt: skip
    method = getattr(Client, name)
    taken = {one: given[one] for one in inspect.signature(method).parameters if one in given}
    transport = httpx.MockTransport(note)
    with Client("http://localhost", transport=transport) as client, pytest.raises(Incompatible):
        method(client, **taken)
    (request,) = asked
    assert request.method == verb.upper()
    parts = request.url.raw_path.decode().partition("?")[0].split("/")
    assert len(parts) == len(path.split("/")), "an id is one part of the path, whatever it holds"
    for part, wanted in zip(parts, path.split("/"), strict=True):
        assert part == wanted or wanted == "{id}"
    if "requestBody" in operation:
        assert request.headers["content-type"] == "application/json"


def test_every_operation_says_that_errors_are_problems() -> None:
    for _, _, operation in OPERATIONS.values():
        told = operation["responses"]["default"]["content"]
        assert told == {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
        }
        assert operation["description"] or operation["summary"]
    assert "HTTPValidationError" not in str(SCHEMA)


@pytest.mark.parametrize("within", [False, True])
def test_it_asks_a_real_api(rig: Rig, within: bool) -> None:
    client = inprocess.client(rig.config) if within else rig.client()
    with client, rig.engine() as engine:
        engine.tell()
        keys = engine.store(prompt(3))
        engine.client.record({"request": "r", "outcome": "hit"})
        engine.client.status()
        assert client.health().status == client.ready().status == "ok"
        assert "kvstrata_" in client.metrics()
        assert client.version().release == client.status().release
        assert client.namespaces().namespaces[-1].model == MODEL
        assert client.requests(limit=1).records[0].request == "r"
        assert client.lookup(prompt(3)).leading_chunks == 3
        assert client.lookup(keys=[key.hex() for key in keys], model=MODEL).leading_chunks == 3
        client.flush()
        assert client.explain(tokens=prompt(3)).tiers == {"host": 3 * CHUNK}
        assert client.explain("r").record is not None
        assert client.route({"a": 0}, tokens=prompt(3)).reason == "only"
        assert client.clear(keys=[keys[2].hex()], tiers=["host"]).objects == 1
        assert client.clear(everything=True).objects == 5
        assert client.jobs().jobs == []
        with pytest.raises(ApiProblem, match="no job api-9") as caught:
            client.job("api-9")
        assert caught.value.problem.status == 404
        with pytest.raises(ApiProblem) as caught:
            client.lookup([1], text="a")
        assert caught.value.problem.field == "body.text"
        with pytest.raises(UsageError, match="not on this machine"):
            client.lookup(text="a")


def test_its_errors_are_those_of_the_rest() -> None:
    def problem(kind: str, status: int) -> httpx.Response:
        answer = problems.answer(status, "why", kind=kind)
        return httpx.Response(status, content=bytes(answer.body))

    wanted: list[tuple[str, int, type[Exception]]] = [
        ("NodeUnavailable", 503, NodeUnavailable),
        ("TierUnavailable", 503, TierUnavailable),
        ("ReadOnly", 409, errors.ReadOnly),
        ("DeadlineExceeded", 504, DeadlineExceeded),
        ("UsageError", 422, UsageError),
        ("Busy", 503, errors.Busy),
        ("NoSuch", 404, ApiProblem),
        ("ConfigError", 500, ApiProblem),
        ("did_you_mean", 500, ApiProblem),
        ("", 404, ApiProblem),
    ]
    for kind, status, raised in wanted:
        transport = httpx.MockTransport(lambda _, k=kind, s=status: problem(k, s))
        client = Client("http://localhost", transport=transport)
        with client, pytest.raises(raised, match="why") as caught:
            client.status()
        assert type(caught.value) is raised


def test_what_is_no_api_is_told() -> None:
    for answer in (
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"status": 5}),
        httpx.Response(404, text="nginx"),
        httpx.Response(302, headers={"Location": "http://elsewhere/"}),
    ):
        transport = httpx.MockTransport(lambda _, answer=answer: answer)
        client = Client("http://localhost", transport=transport)
        with client, pytest.raises(Incompatible, match="is no API of this release"):
            client.health()
    with Client("http://127.0.0.1:1") as client, pytest.raises(NodeUnavailable, match="no API"):
        client.health()
    late = httpx.MockTransport(lambda request: (_ for _ in ()).throw(httpx.ReadTimeout("late")))
    with Client("http://localhost", transport=late) as client, pytest.raises(DeadlineExceeded):
        client.health()


def test_what_the_room_exports() -> None:
    assert control.__all__ == ["Client"]
