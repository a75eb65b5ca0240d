"""An operator's work through the API, on a real node: what it leads to, and how it is told."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.apis import MODEL, SPACE, Engine, Rig, prompt
from tests.support.nodes import owned, template

from kvstrata.control import Client
from kvstrata.control.client import ApiProblem
from kvstrata.control.verbs.jobs import Job
from kvstrata.errors import UsageError
from kvstrata.keys import owner_digest
from kvstrata.wire.client import offsets_of
from kvstrata.wire.operator import Operator
from kvstrata.wire.protocol import DRAINING

ABSENT, HOST, DISK = 255, 0, 1


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name), {"disk.codec": "raw"})
        with rig.engine() as engine:
            engine.tell()
        yield rig
        rig.close()


@pytest.fixture
def rig(shared: Rig) -> Iterator[Rig]:
    assert shared.node is not None
    shared.ask("POST", "/v1/clear", {"everything": True})
    yield shared
    shared.node.check_integrity()


@pytest.fixture
def client(rig: Rig) -> Iterator[Client]:
    with rig.client() as client:
        yield client


def secret_of(rig: Rig) -> bytes:
    return Path(rig.options["secret_file"]).read_bytes()


def ended(client: Client, job: Job) -> Job:
    deadline = time.monotonic() + 60
    while job.state == "running":
        assert time.monotonic() < deadline, job
        time.sleep(0.01)
        job = client.job(job.id)
    return job


def test_a_prompt_is_brought_ahead_of_need(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(3))
        engine.client.clear(keys, ["host"])
        job = ended(client, client.prefetch(tokens=prompt(5)))
        assert (job.state, job.kind, job.done) == ("done", "prefetch", 3)
        assert job.id.startswith("node-")
        assert job.note, "it says why it ended before the prompt did"
        assert list(engine.client.lookup(keys, [0])) == [HOST] * 3


@pytest.mark.parametrize("move", [False, True])
def test_chunks_are_copied_and_moved(rig: Rig, client: Client, move: bool) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(3))
        engine.client.clear(keys, ["host"])
        begin = client.move if move else client.copy
        job = ended(client, begin("disk", "host", tokens=prompt(3), model=MODEL))
        assert (job.state, job.failed, job.done) == ("done", 0, 3)
        assert list(engine.client.lookup(keys, [0])) == [HOST] * 3
        engine.client.clear(keys, ["host"])
        left = ABSENT if move else DISK
        assert list(engine.client.lookup(keys, [0])) == [left] * 3


def test_keys_name_chunks_too(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(2))
        engine.client.clear(keys, ["host"])
        some = [keys[0].hex()]
        ended(client, client.prefetch(keys=some, namespace=SPACE.digest().hex()))
        assert list(engine.client.lookup(keys, [0])) == [HOST, DISK]


def test_a_salts_chunks_are_its_own(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(2), salt="ada")
        engine.client.clear(keys, ["host"])
        ended(client, client.prefetch(tokens=prompt(2)))
        assert list(engine.client.lookup(keys, [0])) == [DISK, DISK]
        ended(client, client.prefetch(tokens=prompt(2), salt="ada"))
        assert list(engine.client.lookup(keys, [0])) == [HOST, HOST]


def test_everything_that_is_held_comes_in_pages(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(5))
        engine.client.clear(keys[:2], ["host"])
    seen, after = [], ""
    while True:
        page = client.chunks(after=after, limit=2)
        assert len(page.chunks) <= 2
        seen += page.chunks
        if not (after := page.next):
            break
    assert [one.key for one in seen] == sorted(key.hex() for key in keys)
    held = {one.key: one for one in seen}
    assert set(held[keys[0].hex()].tiers) == {"disk"}
    assert set(held[keys[4].hex()].tiers) == {"host", "disk"}
    last = held[keys[4].hex()]
    assert (last.parent, last.start) == (keys[3].hex(), 4 * template().num_tokens)
    assert last.namespace == SPACE.digest().hex()
    in_host = client.chunks("host").chunks
    assert {one.key for one in in_host} == {key.hex() for key in keys[2:]}
    with pytest.raises(ApiProblem) as caught:
        client.chunks(after="ab")
    assert caught.value.problem.field == "query.after"


def test_an_object_is_looked_at_where_it_lies(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(2))
    for tier in ("host", "disk"):
        found = client.inspect(tier, keys[1].hex())
        assert found.problem == ""
        assert found.nbytes > 0
        assert found.header["key"] == keys[1].hex()
        assert found.header["parent"] == keys[0].hex()
    assert client.inspect("disk", "00" * 32).nbytes == 0
    with pytest.raises(UsageError, match="tape"):
        client.inspect("tape", keys[0].hex())


def test_a_corrupt_object_is_found_by_a_scrub(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(3))
    files = [one for one in Path(rig.options["disk.path"]).rglob("*") if one.stat().st_size > 5000]
    assert len(files) == 3
    with files[0].open("r+b") as file:
        file.seek(4096 + 100)
        file.write(b"\xff" * 8)
    problems = [client.inspect("disk", key.hex()).problem for key in keys]
    assert sum(bool(one) for one in problems) == 1
    job = ended(client, client.scrub("disk"))
    assert job.kind == "scrub"
    assert len(job.troubles) == job.failed == 1
    job = ended(client, client.scrub("disk"))
    assert (job.state, job.troubles) == ("done", []), "it is out of the way"


def test_objects_are_stored_in_another_form(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(2))
        before = client.inspect("disk", keys[0].hex())
        job = ended(client, client.transcode("disk", "lossless"))
        assert (job.kind, job.state, job.failed) == ("transcode", "done", 0)
        after = client.inspect("disk", keys[0].hex())
        assert (before.header["codec"], after.header["codec"]) == ("raw", "lossless")
        assert after.problem == ""
        assert after.nbytes < before.nbytes
    with pytest.raises(UsageError, match="zip"):
        client.transcode("disk", "zip")


def test_a_drained_node_takes_no_stores_until_it_may_again(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        job = ended(client, client.drain())
        assert (job.kind, job.state) == ("drain", "done")
        keys = engine.keys(prompt(2))
        call = engine.client.reserve(SPACE.digest(), keys, 0, 0, template())
        assert list(offsets_of(call.wait(5.0).offsets)) == [DRAINING, DRAINING]
        assert client.undrain().was_drained
        assert not client.undrain().was_drained, "it can be repeated"
        assert list(engine.client.lookup(engine.store(prompt(2)), [0])) == [HOST, HOST]


def test_what_may_change_while_it_runs_changes(rig: Rig, client: Client) -> None:
    config = {**rig.config.to_dict(), "planner": "off"}
    assert client.reload(config).changed == ["planner"]
    assert client.reload(config).changed == []
    with pytest.raises(ApiProblem, match=r"host\.capacity") as caught:
        client.reload({**config, "host": {"capacity": "17MiB"}})
    assert (caught.value.problem.status, caught.value.problem.field) == (422, "body.config")
    with pytest.raises(ApiProblem, match="nothing") as caught:
        client.reload({"nothing": 1})
    assert caught.value.problem.status == 422
    assert client.reload(rig.config.to_dict()).changed == ["planner"]


def test_jobs_of_node_and_api_are_one_list(rig: Rig, client: Client) -> None:
    of_node = [ended(client, client.scrub("host")).id for _ in range(3)]
    of_api = client.warm("http://127.0.0.1:1", "m", ["a"])
    ended(client, of_api)
    seen, after = [], ""
    while True:
        page = client.jobs(after, limit=2)
        seen += [job.id for job in page.jobs]
        if not (after := page.next):
            break
    assert seen[:4] == [of_api.id, *of_node[::-1]]
    assert len(set(seen)) == len(seen)
    again = client.cancel(of_node[0])
    assert (again.id, again.state) == (of_node[0], "done"), "what has ended stays as it is"
    for id in ("node-99999", "node-0", "node--1", "node-x", "node-", "nothing", "9" * 40):
        for ask in (client.job, client.cancel):
            with pytest.raises(ApiProblem) as caught:
                ask(id)
            assert caught.value.problem.status == 404


def test_a_pin_keeps_a_prompt_until_it_ends(rig: Rig, client: Client) -> None:
    whose = owner_digest(secret_of(rig), "a", "").hex()
    with rig.engine() as engine:
        engine.store(prompt(3))
    pinned = client.pin("system prompt", 3600, tokens=prompt(3))
    assert (pinned.chunks, pinned.kept, pinned.owner) == (3, 3, whose)
    assert pinned.tiers["disk"] == 3
    (one,) = client.pins().pins
    assert (one.name, one.owner, one.chunks, one.kept) == ("system prompt", whose, 3, 3)
    assert time.time() + 3500 < one.until < time.time() + 3700
    renewed = client.pin("system prompt", 7200, tokens=prompt(3))
    assert renewed == pinned
    (one,) = client.pins().pins
    assert one.until > time.time() + 7000
    salted = client.pin("system prompt", 60, tokens=prompt(1), salt="ada")
    assert salted.owner == owner_digest(secret_of(rig), "a", "ada").hex() != whose
    page = client.pins(limit=1)
    assert len(page.pins) == 1
    assert len(client.pins(page.next).pins) == 1
    assert client.unpin("system prompt", tenant="a", salt="ada").chunks == 1
    assert client.unpin("system prompt", owner=whose).chunks == 3
    assert client.unpin("system prompt", tenant="a").chunks == 0, "it can be repeated"
    assert client.pins().pins == []


def test_a_tenant_has_no_more_than_its_quota(rig: Rig, client: Client) -> None:
    with rig.engine() as engine:
        keys = engine.store(prompt(4))
        owner = engine.owner_of(keys[0])
        held = client.quota("disk", None, owner=owner)
        assert held.owner == owner
        assert client.quota("disk", held.nbytes // 2, owner=owner).nbytes <= held.nbytes // 2
        assert list(engine.client.lookup(keys, [0])) == [HOST] * 4
        engine.client.clear(keys, ["host"])
        assert list(engine.client.lookup(keys, [0])) == [DISK, DISK, ABSENT, ABSENT], "head first"
        assert client.quota("disk", None, owner=owner).owner == owner
    with pytest.raises(ApiProblem) as caught:
        client.quota("disk", 1)
    assert caught.value.problem.field == "body.tenant"
    with pytest.raises(ApiProblem) as caught:
        client.quota("disk", 1, owner=owner, tenant="a")
    assert caught.value.problem.field == "body.owner"


def test_a_clear_takes_what_fits_all_that_is_given(rig: Rig, client: Client) -> None:
    other = replace(SPACE, adapter="lora")
    with rig.engine() as engine:
        ours = engine.store(prompt(2))
        theirs = engine.store(prompt(2), other)
        owner = engine.owner_of(ours[0])

        def there() -> tuple[bool, bool]:
            found = [engine.client.lookup(keys, [0]) for keys in (ours, theirs)]
            return found[0] == bytes(2), found[1] == bytes(2)

        client.clear(namespace=other.digest().hex(), before=1.0)
        assert there() == (True, True), "nothing is that old"
        client.clear(namespace=other.digest().hex(), tenant="nobody")
        assert there() == (True, True)
        client.clear(namespace=other.digest().hex())
        assert there() == (True, False)
        client.clear(owner=owner, before=time.time())
        assert there() == (False, False)
    with pytest.raises(ApiProblem) as caught:
        client.clear(everything=True, tenant="a")
    assert caught.value.problem.field == "body.everything"


def test_a_tenant_is_meant_by_each_of_two_secrets() -> None:
    """While one takes the other's place, pins and chunks of before are the tenant's, too."""
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        secret = Path(folder) / "secret"
        secret.write_bytes(bytes(range(64)))
        secret.chmod(0o600)
        rig = Rig(Path(folder))
        try:
            assert rig.node is not None
            with rig.engine() as engine, rig.client() as client:
                old = Engine(engine.client, engine.client.hello.secrets[1])
                kept = {one: one.store(prompt(3, start)) for one, start in ((engine, 0), (old, 99))}
                whose = [bytes.fromhex(one.owner_of(keys[0])) for one, keys in kept.items()]
                operator = Operator(engine.client)
                for owner, keys in zip(whose, kept.values(), strict=True):
                    operator.pin(keys, owner, "manual", 60.0)
                assert client.unpin("manual", tenant="a").chunks == 6
                operator.pin(kept[old], whose[1], "manual", 60.0)
                assert client.unpin("manual", tenant="a").chunks == 3
                assert list(operator.pins()) == []
                held = client.quota("disk", 1 << 30, tenant="a")
                each = [operator.quota(owner, "disk", 1 << 30) for owner in whose]
                assert (held.owner, held.nbytes) == (whose[0].hex(), sum(each))
                assert min(each) > 0
                assert owned(rig.node.node).ledger.quotas == dict.fromkeys(whose, 1 << 30)
                client.quota("disk", None, tenant="a")
                assert owned(rig.node.node).ledger.quotas == {}
        finally:
            rig.close()
