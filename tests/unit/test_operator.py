"""An operator's client against a real node's socket, and nodes that fetch from each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.members import Member
from tests.support.nodes import NAMESPACE, ORDER, RAW, SLOT, chunk_keys, template

from kvstrata.errors import Busy, DeadlineExceeded, KVStrataError, UsageError
from kvstrata.transfer import peers as p
from kvstrata.wire.operator import Operator


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Member]]:
    with contextlib.ExitStack() as ends:

        def make(**options: Any) -> Member:
            member = Member(tmp_path, **({"peer.named": "loopback"} | options))
            ends.callback(member.close)
            return member

        yield make


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    return {"disk.path": str(tmp_path / "disk"), "disk.capacity": "1MiB", "disk.codec": "raw"}


def test_every_request_over_the_socket(fleet: Callable[..., Member], disk: dict[str, Any]) -> None:
    node, keys = fleet(**disk), chunk_keys(4)
    operator = Operator(node.client)
    node.store(keys)
    node.client.flush()
    state = operator.wait(operator.copy(keys, "host", "disk"), 10.0)
    assert (state.kind, state.state, state.note) == ("copy", "done", "4 were there already")
    node.client.clear(tiers=["host"])
    assert operator.wait(operator.prefetch(keys), 10.0).done == 4
    assert operator.wait(operator.copy(keys, "disk", "host", move=True), 10.0).done == 4
    assert {one.key: one.tiers for one in operator.chunks(page=3)} == {
        key: {"host": SLOT} for key in keys
    }
    assert operator.wait(operator.copy(keys, "host", "disk", move=True), 10.0).failed == 0
    assert [one.key for one in operator.chunks("disk")] == sorted(keys)
    assert operator.wait(operator.scrub("disk"), 10.0).done == 4
    assert operator.wait(operator.transcode("disk", "raw"), 10.0).note
    assert operator.inspect("disk", keys[0]).problem == ""
    ended = operator.wait(operator.drain(), 10.0)
    assert ended.note == "all is written"
    assert operator.undrain()
    told = list(operator.jobs(page=2))
    assert [one.kind for one in told] == [
        "copy", "prefetch", "move", "move", "scrub", "transcode", "drain",
    ]  # fmt: skip
    assert operator.cancel(told[0].id) is False
    config = node.inprocess.config.to_dict()
    assert operator.reload(config | {"planner": "off"}).changed == ["planner"]
    with pytest.raises(KVStrataError, match=r"host\.capacity: cannot change"):
        operator.reload(config | {"host": {"capacity": "2MiB"}})
    with pytest.raises(UsageError, match="no job 99"):
        operator.job(99)
    assert node.get(keys) == [1] * 4


def test_a_wait_has_its_end(fleet: Callable[..., Member]) -> None:
    node, keys = fleet(), chunk_keys(1)
    operator = Operator(node.client)
    node.client.reserve(NAMESPACE, keys, 0, 0, template()).wait(5.0)
    number = operator.drain()
    with pytest.raises(DeadlineExceeded, match=f"job {number} has not ended"):
        operator.wait(number, 0.1)
    assert operator.cancel(number)
    assert operator.wait(number, 10.0).state == "cancelled"


class TestSend:
    def test_another_node_fetches_what_it_is_sent(
        self, fleet: Callable[..., Member], disk: dict[str, Any]
    ) -> None:
        """Out of this node's slower tiers too, with nothing but the keys."""
        ours, theirs, keys = fleet(**disk), fleet(), chunk_keys(8)
        ours.store(keys)
        ours.client.flush()
        ours.client.clear(tiers=["host"])
        operator = Operator(ours.client)
        job = operator.wait(operator.send(keys, str(theirs.address)), 20.0)
        assert (job.state, job.done, job.nbytes, job.troubles) == ("done", 8, 8 * SLOT, [])
        assert theirs.get(keys) == [0] * 8
        (fetched,) = Operator(theirs.client).jobs()
        assert (fetched.kind, fetched.state, fetched.done) == ("fetch", "done", 8)
        again = operator.wait(operator.send(keys, str(theirs.address)), 20.0)
        assert (again.done, again.nbytes) == (8, 0)

    def test_in_as_many_rounds_as_there_is_room(
        self, fleet: Callable[..., Member], disk: dict[str, Any], tmp_path: Path
    ) -> None:
        """Neither node holds more still than a process may."""
        ours = fleet(**disk, **{"leases.per_client": "20%"})
        theirs, keys = fleet(), chunk_keys(30)
        for first in range(0, 30, 5):
            ours.store(keys[first : first + 5])
            ours.client.flush()
        operator = Operator(ours.client)
        job = operator.wait(operator.send(keys, str(theirs.address)), 20.0)
        assert (job.state, job.done) == ("done", 30), job
        assert theirs.get(keys) == [0] * 30
        assert sum(one.kind == "fetch" for one in Operator(theirs.client).jobs()) > 1

    def test_only_to_and_from_whom_the_operators_allow(self, fleet: Callable[..., Member]) -> None:
        ours, wary, keys = fleet(), fleet(**{"peer.named": "127.0.0.1:1"}), chunk_keys(2)
        ours.store(keys)
        wary.store(keys)
        operator = Operator(ours.client)
        job = operator.wait(operator.send(keys, str(wary.address)), 20.0)
        assert job.state == "failed"
        assert f"the peer {ours.address} may not be named here" in job.note
        with pytest.raises(UsageError, match="may not be named here"):
            Operator(wary.client).send(keys, str(ours.address))
        with pytest.raises(UsageError, match="no host and port"):
            operator.send(keys, "nowhere")

    def test_a_copy_out_of_a_peers_memory_and_no_move(self, fleet: Callable[..., Member]) -> None:
        theirs, keys = fleet(), chunk_keys(4)
        ours = fleet(**{"peer.nodes": str(theirs.address)}).ready()
        theirs.store(keys)
        operator, made = Operator(ours.client), ([0], [ORDER], NAMESPACE)
        with pytest.raises(UsageError, match="peer is not this node's to remove"):
            operator.copy(keys, "peer", "host", *made, move=True)
        with pytest.raises(UsageError, match="nothing is ever written to peer"):
            operator.copy(keys, "host", "peer", *made)
        job = operator.wait(operator.copy(keys, "peer", "host", *made), 20.0)
        assert (job.failed, job.nbytes) == (0, 4 * SLOT)
        assert ours.get(keys) == [0] * 4

    def test_nobody_is_there(self, fleet: Callable[..., Member]) -> None:
        ours, theirs, keys = fleet(), fleet(), chunk_keys(2)
        ours.store(keys)
        theirs.close()
        operator = Operator(ours.client)
        job = operator.wait(operator.send(keys, str(theirs.address)), 20.0)
        assert job.state == "failed"
        assert str(theirs.address) in job.note

    def test_one_that_has_no_room_takes_what_it_can(self, fleet: Callable[..., Member]) -> None:
        ours, small, keys = fleet(), fleet(**{"leases.per_client": "5%"}), chunk_keys(12)
        ours.store(keys)
        operator = Operator(ours.client)
        job = operator.wait(operator.send(keys, str(small.address)), 20.0)
        assert job.state == "failed"
        assert job.done == (1 << 20) // 20 // SLOT
        assert "no room in host" in job.note

    def test_a_peer_starts_no_more_than_so_many(self, fleet: Callable[..., Member]) -> None:
        inprocess = fleet().inprocess
        fetch, where = inprocess.node.operations.fetch, "127.0.0.1:9"

        def asked(number: int) -> p.Fetch:
            return p.Fetch(where, NAMESPACE, [bytes([number]) * 32], [0], [ORDER], [RAW])

        def all_of_them() -> None:
            jobs = {fetch(asked(number)).job for number in range(4)}
            assert len(jobs) == 4
            assert fetch(asked(3)).job in jobs, "it is at it already"
            with pytest.raises(Busy, match="4 fetch jobs run already"):
                fetch(asked(4))
            with pytest.raises(UsageError, match="name parts, orders and the"):
                fetch(p.Fetch(where, b"", [bytes(32)], [0], [ORDER], [RAW]))
            with pytest.raises(UsageError, match="no such job"):
                fetch(p.Watch(99))

        inprocess.run(all_of_them)

    def test_a_peer_sees_no_job_but_those_that_peers_began(
        self, fleet: Callable[..., Member]
    ) -> None:
        node = fleet()
        number = Operator(node.client).drain()
        fetch = node.inprocess.node.operations.fetch
        with pytest.raises(UsageError, match="no such job"):
            node.inprocess.run(lambda: fetch(p.Watch(number)))
