"""`kvstrata cluster`: what it prints and how it ends, with nodes and a registry that are real."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.attached import SECRET
from tests.support.nodes import NAMESPACE as STORED_IN
from tests.support.nodes import RAW, payload, template
from tests.support.registries import Fleet, fleet_in, until
from typer.testing import CliRunner, Result

from kvstrata.cli import build_app
from kvstrata.errors import ConfigError, UsageError
from kvstrata.fleet.members import Member
from kvstrata.keys import KeyChain, Namespace, owner_digest
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.testing.servers.redis import free_port, installed
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of
from kvstrata.wire.namespaces import Described

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

TOKENS = list(range(500))
NAMESPACE = Namespace("a-model", "a layout", 64)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_in(tmp_path) as fleet:
        yield fleet


def cluster(fleet: Fleet, *words: str) -> Result:
    settings = ["--set", f"fleet.registry={fleet.server.url}"]
    settings += ["--set", f"secret_file={fleet.folder / 'secret'}"]
    return CliRunner().invoke(build_app(), ["cluster", *words, *settings])


def test_members_and_who_has_what(fleet: Fleet) -> None:
    assert "node" in cluster(fleet, "members").stdout
    a = fleet.join("a")
    fleet.join("b")
    a.client.record(Described(NAMESPACE, {"name": "org/a-model"}).record())
    keys = KeyChain(SECRET, NAMESPACE.digest(), 64).keys(TOKENS)
    a.store(keys[:5])
    until(lambda: fleet.members()["a"].models)
    a.told()
    shown = cluster(fleet, "members", "--json")
    assert shown.exit_code == 0
    told = {one["name"]: one for one in json.loads(shown.stdout)}
    assert told.keys() == {"a", "b"}
    assert told["a"]["models"][0]["model"] == "org/a-model"
    table = cluster(fleet, "members").stdout
    assert "org/a-model" in "".join(table.split())
    prompt = fleet.folder / "prompt.json"
    prompt.write_text(json.dumps(TOKENS))
    found = cluster(fleet, "lookup", str(prompt))
    assert found.stdout.splitlines() == [
        "500 tokens, 7 chunks of 64",
        "a: 320 tokens; chunks: 5 in host",
    ]
    digest = NAMESPACE.digest().hex()
    found = cluster(fleet, "lookup", str(prompt), "--json", "--namespace", digest)
    assert json.loads(found.stdout) == [
        {"node": "a", "peers": "", "chunks": 5, "tokens": 320, "tiers": {"host": 5}}
    ]
    a.client.clear()
    a.told()
    assert "no node has any of it" in cluster(fleet, "lookup", str(prompt)).stdout
    prompt.write_text("{}")
    assert isinstance(cluster(fleet, "lookup", str(prompt)).exception, UsageError)
    missing = cluster(fleet, "lookup", str(prompt), "--namespace", "ff")
    assert isinstance(missing.exception, UsageError)


def test_commands_say_what_each_node_answered(fleet: Fleet) -> None:
    a, _ = fleet.join("a"), fleet.join("b")
    assert isinstance(cluster(fleet, "clear").exception, UsageError)  # there is no terminal
    a.store(KeyChain(SECRET, NAMESPACE.digest(), 64).keys(TOKENS))
    done = cluster(fleet, "clear", "--yes")
    assert done.exit_code == 0
    assert sorted(done.stdout.splitlines()) == ["a: done, 7 objects", "b: done, 0 objects"]
    assert cluster(fleet, "flush", "--only", "b").stdout == "b: done, 0 objects\n"
    fleet.registry.renew(Member("mute", 1, "r", p.PROTOCOL_VERSION, 1), 60.0, None)
    late = cluster(fleet, "flush", "--timeout", "1")
    assert late.exit_code == 1
    assert "mute: no answer in time" in late.stdout


def test_a_registry_that_is_not_there_is_one_line(fleet: Fleet) -> None:
    settings = ["--set", f"fleet.registry=redis://127.0.0.1:{free_port()}"]
    found = CliRunner().invoke(build_app(), ["cluster", "members", *settings])
    assert found.exit_code == 1
    assert found.stderr.startswith("kvstrata: redis at 127.0.0.1")
    assert isinstance(CliRunner().invoke(build_app(), ["cluster"]).exception, ConfigError)


def test_a_clear_may_be_of_a_tenant_a_namespace_or_an_age(fleet: Fleet) -> None:
    a = fleet.join("a")
    keys = KeyChain(SECRET, NAMESPACE.digest(), 64).keys(TOKENS)
    mine, theirs = owner_digest(SECRET, "mine", "s"), owner_digest(SECRET, "theirs", "")
    for some, owner in ((keys[:3], mine), (keys[3:], theirs)):
        call = a.client.reserve(STORED_IN, some, 0, 0, template(), owner=owner)
        reserved = call.wait(10.0)
        sums = []
        for key, offset in zip(some, offsets_of(reserved.offsets), strict=True):
            a.client.pool.view(offset + HEADER_BYTES, RAW)[:] = payload(key)
            sums.append(checksum(payload(key)))
        a.client.commit(reserved.reservation, sums).wait(10.0)
    assert a.has(keys) == 7
    for nothing in (
        ["--tenant", "mine"],  # without its salt it is another one
        ["--namespace", "ff" * 32],
        ["--older-than", "1h"],
    ):
        done = cluster(fleet, "clear", "--yes", *nothing)
        assert done.exit_code == 0, done.output
        assert a.has(keys) == 7
    assert cluster(fleet, "clear", "--yes", "--tenant", "mine", "--salt", "s").exit_code == 0
    assert a.client.lookup(keys, [0]) == b"\xff" * 3 + bytes(4)
    done = cluster(fleet, "clear", "--yes", "--namespace", STORED_IN.hex())
    assert done.exit_code == 0
    assert a.has(keys) == 0
    for wrong in (["--salt", "s"], ["--namespace", "xy"], ["--older-than", "soon"]):
        assert isinstance(cluster(fleet, "clear", "--yes", *wrong).exception, UsageError)
