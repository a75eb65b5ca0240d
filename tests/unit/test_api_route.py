"""Advice for routers over the API: by what was sent, and by the fleet's registry."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.apis import Rig
from tests.support.attached import SECRET
from tests.support.registries import Fleet, fleet_in, until
from tests.unit.test_tokenizing import model

from kvstrata.control.verbs import route
from kvstrata.errors import Incompatible
from kvstrata.fleet.members import Member, Model, decode_member, encode_member
from kvstrata.keys import KeyChain, Namespace
from kvstrata.testing.servers.redis import installed
from kvstrata.wire.namespaces import Described

CHUNK = 64
NODES = {"a": 0, "b": 0}
WORDS = ["hello", "world"] * 150


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, the registry is waited for."""
    monkeypatch.setattr(route, "LOOK_S", 60.0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a path short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def alone() -> Iterator[Rig]:
    """An API whose node does not even run."""
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name), lives=False)
        yield rig
        rig.close()


def test_a_prompt_goes_where_its_beginning_went(alone: Rig) -> None:
    with alone.client() as client:
        tokens = list(range(4096))
        untold = client.route(NODES, tokens=tokens, sent=False)
        assert (untold.reason, untold.hit_tokens, untold.looked_up) == ("load", 0, False)
        assert sorted(untold.candidates) == ["a", "b"]
        first = client.route(NODES, tokens=tokens)
        assert first == untold, "nothing was remembered"
        again = client.route(NODES, tokens=[*tokens, 7], sent=False)
        assert (again.node, again.reason, again.hit_tokens) == (first.node, "hit", 4096)
        assert again.text.startswith(f"{first.node}: it has 4096 tokens of the prompt")
        assert again.note == "", "there is no registry"
        assert client.route(NODES, tokens=tokens, sent=False, salt="s").hit_tokens == 0
        assert client.route(NODES, tokens=tokens, sent=False, model="m").hit_tokens == 0
        (other,) = set(NODES) - {first.node}
        busy = client.route({first.node: 1e6, other: 0}, tokens=tokens, sent=False)
        assert (busy.node, busy.hit_tokens) == (other, 0)
        assert client.route({"c": 5.5}, tokens=tokens, sent=False).reason == "only"


def test_a_request_is_a_prompt_as_engines_are_asked(alone: Rig) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "why " * 2000}]}
    with alone.client() as client:
        first = client.route(NODES, body=body)
        longer = {**body, "messages": [*body["messages"], {"role": "user", "content": "x"}]}
        again = client.route(NODES, body=longer, sent=False)
    assert (again.node, again.reason) == (first.node, "hit")
    assert 1500 < again.hit_tokens < 2100


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({}, "body.tokens"),
        ({"tokens": [1], "body": {}}, "body.tokens"),
        ({"body": {}, "salt": "s"}, "body.salt"),
        ({"body": {}, "model": "m"}, "body.model"),
        ({"tokens": [-1]}, "body.tokens.0"),
        ({"tokens": [1], "nodes": {}}, "body.nodes"),
        ({"tokens": [1], "nodes": {"a": -1}}, "body.nodes.a"),
        ({"tokens": [1], "nodes": {"a": float("nan")}}, "body.nodes.a"),
        ({"tokens": [1], "nodes": dict.fromkeys(map(str, range(257)), 0)}, "body.nodes"),
        ({"tokens": [1], "namespace": "x"}, "body.namespace"),
    ],
)
def test_a_wrong_field_is_named(alone: Rig, more: Any, field: str) -> None:
    problem = alone.ask("POST", "/v1/route", {"nodes": NODES, **more}).problem
    assert (problem["status"], problem["field"]) == (422, field)


# with a registry


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    if not installed():
        pytest.skip("there is no redis-server here")
    with fleet_in(tmp_path) as fleet:
        yield fleet


@pytest.fixture
def rig(fleet: Fleet, folder: Path) -> Iterator[Rig]:
    """A member of the fleet with an API."""
    own = fleet.folder / "secret"
    own.write_bytes(SECRET)
    own.chmod(0o600)
    options = {"fleet.registry": fleet.server.url, "fleet.name": "api", "secret_file": str(own)}
    rig = Rig(folder, options)
    yield rig
    rig.close()


def test_the_registry_says_what_its_members_have(fleet: Fleet, rig: Rig, folder: Path) -> None:
    files = str(model(folder / "model"))
    space = Namespace("a-model", "a layout", CHUNK)
    told = Described(space, {"name": files, "weights": "w"}).record()
    a, b = fleet.join("a"), fleet.join("b")
    with rig.engine() as engine:
        for attached in (a.client, b.client, engine.client):
            attached.record(told)
    tokens = [0, *(4 + n % 2 for n in range(300))]  # of the words below
    keys = KeyChain(SECRET, space.digest(), CHUNK).keys(tokens)
    until(lambda: all(fleet.members()[name].models for name in "ab"))
    with rig.client() as client:
        for name in NODES:  # to the API's memory both have it
            client.route({name: 0}, tokens=tokens)
        for node, other in ((a, b), (b, a)):
            other.client.clear()
            node.store(keys)
            other.told()
            node.told()
            asked: list[dict[str, Any]] = [
                {"tokens": tokens},
                {"tokens": tokens, "model": files},
                {"tokens": tokens, "namespace": space.digest().hex()},
                {"body": {"prompt": tokens}},
                {"body": {"prompt": [tokens], "model": files}},
                {"body": {"prompt": " ".join(WORDS)}},
                {"body": {"prompt": " ".join(WORDS), "model": "served as"},
                 "namespace": space.digest().hex()},
            ]  # fmt: skip
            for one in asked:
                found = client.route(NODES, **one, sent=False)
                assert (found.node, found.reason) == (node.name, "hit"), (one, found)
                assert found.looked_up, found.note
                assert found.hit_tokens == 256
        salted = client.route(NODES, body={"prompt": tokens, "cache_salt": "s"})
        assert (salted.looked_up, salted.hit_tokens) == (True, 0)
        unknown: list[tuple[dict[str, Any], str]] = [
            ({"tokens": tokens, "model": "nobody's"}, "no engine of these nodes"),
            ({"body": {"messages": [1]}}, "no prompt"),
            ({"nodes": {"c": 0, "d": 0}, "tokens": tokens}, "none of the nodes"),
        ]
        for more, words in unknown:
            found = client.route(**{"nodes": NODES, **more}, sent=False)
            assert not found.looked_up
            assert words in found.note


HOSTILE = [
    {"prompt": [1.5]}, {"prompt": [[-1]]}, {"prompt": [1 << 70]}, {"prompt": ["a", 1]},
    {"prompt": True}, {"prompt": {}}, {"prompt": "\ud800"}, {"messages": [{"role": "\ud800"}]},
    {"messages": [{"content": 5}]}, {"messages": []}, {"prompt": "a", "cache_salt": "\ud800"},
    {"prompt": "a", "cache_salt": [1]}, {"prompt": "a", "model": ["m"]}, {"model": "\ud800"},
    {"prompt": "a" * 100_000}, {"prompt": [float("nan")]},
]  # fmt: skip


def test_whatever_a_body_is_there_is_advice_or_a_problem(fleet: Fleet, rig: Rig) -> None:
    a = fleet.join("a")
    files = str(model(fleet.folder / "model"))
    told = Described(Namespace("a-model", "a layout", CHUNK), {"name": files, "weights": "w"})
    with rig.engine() as engine:
        engine.client.record(told.record())
    a.client.record(told.record())
    until(lambda: fleet.members()["a"].models)
    deep = b'{"nodes": {"a": 0}, "body": {"prompt": %s}}' % (b"[" * 400 + b"]" * 400)
    bodies = [json.dumps({"nodes": {"a": 0}, "body": one}).encode() for one in HOSTILE]
    for body in [*bodies, deep, deep.replace(b"[" * 400, b"[" * 40_000)]:
        answer = rig.ask("POST", "/v1/route", body, {"Content-Type": "application/json"})
        assert answer.status in (200, 400, 422), (body[:80], answer.body)


def test_a_registry_that_does_not_answer_is_not_waited_for(
    fleet: Fleet, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig.client() as client:
        fleet.server.pause()
        monkeypatch.setattr(route, "LOOK_S", 0.05)
        found = client.route(NODES, tokens=[1, 2])
        assert "did not answer within" in found.note
        monkeypatch.setattr(route, "LOOK_S", 60.0)
        found = client.route(NODES, tokens=[1, 2])
        assert "redis" in found.note
        assert (found.node in NODES, found.looked_up) == (True, False)
        fleet.server.resume()


@pytest.mark.parametrize(
    "changed",
    [{"namespace": "ff"}, {"namespace": "x" * 64}, {"parts": 0}, {"parts": 1 << 40},
     {"chunk_tokens": 0}, {"objects": [-1]}, {"objects": [0, 1], "needs": [1]}],
)  # fmt: skip
def test_what_no_node_says_of_itself_is_passed_over(changed: dict[str, Any]) -> None:
    good = Model("ab" * 32, "m", 16, 2)
    member = Member("a", 1, "r", 2, 1, models=[good])
    value = encode_member(member)
    assert decode_member(value) == member
    told = json.loads(value[16:])
    told["models"][0] |= changed
    with pytest.raises(Incompatible):
        decode_member(value[:16] + json.dumps(told).encode())
