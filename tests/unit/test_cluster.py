"""`kvstrata cluster`: what it prints and how it ends, with nodes and a registry that are real."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.attached import SECRET
from tests.support.nodes import NAMESPACE as STORED_IN
from tests.support.nodes import RAW, owned, payload, template
from tests.support.registries import Fleet, fleet_in, until
from typer.testing import CliRunner, Result

from kvstrata.cli import build_app
from kvstrata.errors import ConfigError, UsageError
from kvstrata.fleet import commands
from kvstrata.fleet.members import Member
from kvstrata.keys import KeyChain, Namespace, owner_digest
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.testing.ports import free_port
from kvstrata.testing.servers.redis import installed
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of
from kvstrata.wire.namespaces import Described
from kvstrata.wire.operator import Operator

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


def test_it_is_told_how_many_objects_a_chunk_has(fleet: Fleet) -> None:
    """What an engine tells, or else one for each rank or slice."""
    a = fleet.join("a")
    two, shared = Namespace("two", "a layout", 64, 2), Namespace("shared", "a layout", 64, slices=4)
    cases: list[tuple[Namespace, list[int], int]] = [
        (two, [], 2),
        (replace(two, model="of a latent"), [0], 1),
        (replace(two, model="of two groups"), [0, 1, 1 << 16, 1 << 16 | 1], 4),
        (replace(shared, pipeline_parallel=2), [], 8),
    ]
    for namespace, objects, _ in cases:
        a.client.record(Described(namespace, objects=objects).record())
    until(lambda: len(fleet.members()["a"].models) == len(cases))
    told = {one.namespace: one.parts for one in fleet.members()["a"].models}
    assert told == {namespace.digest().hex(): parts for namespace, _, parts in cases}


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


def options_of(fleet: Fleet, name: str) -> dict[str, object]:
    return {
        "disk.path": str(fleet.folder / name),
        "disk.capacity": "1MiB",
        "pins.per_tenant": "80%",
        "pins.total": "80%",
    }


def test_pins_go_to_every_node_and_end_on_every_node(fleet: Fleet) -> None:
    nodes = [fleet.join(name, **options_of(fleet, name)) for name in "ab"]
    nodes[0].client.record(Described(NAMESPACE, {"name": "org/a-model"}).record())
    keys = KeyChain(SECRET, NAMESPACE.digest(), 64).keys(TOKENS)
    nodes[0].store(keys[:3])
    nodes[0].client.flush()
    until(lambda: fleet.members()["a"].models)
    prompt = fleet.folder / "prompt.json"
    prompt.write_text(json.dumps(TOKENS))
    for _ in range(2):  # it can be repeated
        done = cluster(fleet, "pin", str(prompt), "--name", "manual", "--ttl", "1h")
        assert done.exit_code == 0, done.output
        assert sorted(done.stdout.splitlines()) == [
            "a: 3 of 7 chunks are kept: disk 3",
            "b: 0 of 7 chunks are kept: none here yet",
        ]
        for node in nodes:
            (pin,) = Operator(node.client).pins()
            assert (pin.name, pin.owner) == ("manual", owner_digest(SECRET, "default", ""))
            assert pin.num_chunks == 7
            assert 3500 < pin.until_s - time.time() <= 3600
    nodes[1].store(keys[:3])  # what comes later is kept, too
    assert [one.num_kept for one in Operator(nodes[1].client).pins()] == [3]
    ended = cluster(fleet, "unpin", "manual", "--tenant", "default")
    assert sorted(ended.stdout.splitlines()) == [
        "a: 7 chunks are kept no more",
        "b: 7 chunks are kept no more",
    ]
    again = cluster(fleet, "unpin", "manual", "--tenant", "default")
    assert (again.exit_code, "a: there is no such pin" in again.stdout) == (0, True)
    wrong = cluster(fleet, "pin", str(prompt), "--name", "x", "--ttl", "soon")
    assert isinstance(wrong.exception, UsageError)


def test_quotas_count_on_every_node_by_each_secret(fleet: Fleet) -> None:
    nodes = [fleet.join(name, **options_of(fleet, name)) for name in "ab"]
    other = bytes(reversed(SECRET))
    (fleet.folder / "secret").write_bytes(SECRET + other)  # one takes the other's place
    mine = [owner_digest(one, "mine", "s") for one in (SECRET, other)]
    done = cluster(fleet, "quota", "disk", "64KiB", "--tenant", "mine", "--salt", "s")
    assert done.exit_code == 0, done.output
    assert sorted(done.stdout.splitlines()) == sorted(
        f"{name}: owner {owner.hex()} has 0B in disk" for name in "ab" for owner in mine
    )

    def quotas() -> list[dict[bytes, int]]:
        return [dict(owned(node.inprocess.node).ledger.quotas) for node in nodes]

    assert quotas() == [dict.fromkeys(mine, 64 << 10)] * 2
    one = ["quota", "disk", "none", "--owner", mine[0].hex(), "--only", "b"]
    assert cluster(fleet, *one).exit_code == 0
    assert quotas() == [dict.fromkeys(mine, 64 << 10), {mine[1]: 64 << 10}]
    for wrong in (
        ["quota", "disk", "1GiB"],
        ["quota", "disk", "much", "--tenant", "mine"],
        ["quota", "disk", "1GiB", "--owner", "xy"],
        ["quota", "disk", "1GiB", "--owner", mine[0].hex(), "--salt", "s"],
        ["quota", "tape", "1GiB", "--tenant", "mine"],  # nobody has that
    ):
        assert isinstance(cluster(fleet, *wrong).exception, UsageError)


def test_what_a_node_missed_of_quotas_and_pins_it_does_when_it_is_back(fleet: Fleet) -> None:
    a, b = (fleet.join(name, **options_of(fleet, name)) for name in "ab")
    keys, mine = (
        KeyChain(SECRET, NAMESPACE.digest(), 64).keys(TOKENS),
        owner_digest(SECRET, "m", ""),
    )
    b.close()
    given: list[p.Request] = [
        p.Pin(0, b"".join(keys), mine, "kept", 3600.0),
        p.Pin(0, b"".join(keys), mine, "over", 0.5),
        p.Quota(0, mine, "disk", 64 << 10),
    ]
    for request in given:
        posted = commands.post(fleet.registry, request, 0.0)
        assert commands.wait(fleet.registry, posted, 20.0).answered.keys() == {"a"}
    now = time.time()
    until(lambda: time.time() > now + 1.5)  # every command's time is over, and one pin's
    b = fleet.join("b", **options_of(fleet, "b"))
    assert b.fleet.shown()["seen"] == 3
    (pin,) = Operator(b.client).pins()
    assert pin.name == "kept"
    assert pin.until_s < now + 3600, "its time ran while the node was away"
    assert owned(b.inprocess.node).ledger.quotas == {mine: 64 << 10}
    assert a.good


def test_options_change_on_every_node_and_the_others_stay(fleet: Fleet) -> None:
    a = fleet.join("a", **options_of(fleet, "a"))
    b = fleet.join("b", **{"host.verify_every": 5})

    def verified() -> list[int]:
        return [node.inprocess.node._sampler.every for node in (a, b)]

    for answer in ("changed: host.verify_every", "changed: nothing"):
        done = cluster(fleet, "reload", "host.verify_every=7")
        assert done.exit_code == 0, done.output
        assert sorted(done.stdout.splitlines()) == [f"a: {answer}", f"b: {answer}"]
        assert verified() == [7, 7]
    refused = cluster(fleet, "reload", "disk.scrub_rate=1MiB/s", "host.verify_every=9")
    assert refused.exit_code == 1
    assert "a: changed: host.verify_every, disk.scrub_rate" in refused.stdout
    assert "b: ConfigError: disk" in refused.stdout  # it has none
    assert verified() == [9, 7]
    assert "there is no such option" in cluster(fleet, "reload", "host.color=red").stdout
    restart = cluster(fleet, "reload", "host.capacity=2MiB", "--only", "a")
    assert (restart.exit_code, "restart it" in restart.stdout) == (1, True)
    assert isinstance(cluster(fleet, "reload", "host.verify_every").exception, ConfigError)


def test_who_is_gone_has_not_done_what_cannot_wait(fleet: Fleet) -> None:
    mute = Member("mute", 1, "r", p.PROTOCOL_VERSION, 1)

    def given(*words: str) -> str:
        """What is printed of a node that goes after the command was given, and does not do it."""
        fleet.registry.renew(mute, 60.0, None)
        stream, admin = fleet.registry.names.commands, fleet.server.admin()
        before = admin.xlen(stream)
        with ThreadPoolExecutor(1) as threads:
            giving = threads.submit(cluster, fleet, *words)
            until(lambda: admin.xlen(stream) > before)
            fleet.registry.leave(mute)
            return giving.result().stdout

    assert given("flush") == "mute: gone; it has not done it\n"
    later = "mute: gone; it does it when it comes back, before it takes part\n"
    assert given("clear", "--yes") == later
    assert given("unpin", "x", "--tenant", "t") == later
    assert cluster(fleet, "flush").stdout == "no node is registered\n"
    assert "one that comes" in cluster(fleet, "unpin", "x", "--tenant", "t").stdout


def test_a_clock_that_is_wrong_is_said(fleet: Fleet) -> None:
    for name, ahead_s in (("right", 1.0), ("wrong", -75.0)):
        one = Member(name, 1, "r", p.PROTOCOL_VERSION, 1, clock_offset_s=ahead_s)
        fleet.registry.renew(one, 60.0, None)
    said = cluster(fleet, "members").stdout
    assert "-75000 ms" in said
    assert "wrong: its clock is wrong" in said
    assert "right: its clock" not in said


def test_an_age_is_by_the_registrys_clock(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    a = fleet.join("a")
    keys = KeyChain(SECRET, NAMESPACE.digest(), 64).keys(TOKENS)
    a.store(keys)
    wrong = time.time_ns() + 7200 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: wrong)  # the operator's
    assert cluster(fleet, "clear", "--yes", "--older-than", "1h").exit_code == 0
    assert a.has(keys) == 7
    assert cluster(fleet, "clear", "--yes", "--older-than", "0s").exit_code == 0
    assert a.has(keys) == 0


@pytest.mark.parametrize("seconds", ["-5", "nan", "inf", "1e9"])
def test_a_wait_is_a_time(fleet: Fleet, seconds: str) -> None:
    refused = cluster(fleet, "flush", "--timeout", seconds)
    assert refused.exit_code == 2
    assert "expected 0 to 604800" in refused.stderr
