"""The client against a node played by the test: deadlines, late answers, other versions."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
from tests.support.nodes import NAMESPACE, chunk_keys, template

from kvstrata.errors import (
    DeadlineExceeded,
    Incompatible,
    KVStrataError,
    NodeUnavailable,
    UsageError,
)
from kvstrata.memory.pool import Pool
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.connection import MAX_UNSENT_BYTES

KEYS = chunk_keys(3)


class PlayedNode:
    """The other end of a client's socket."""

    def __init__(self) -> None:
        self.pool = Pool.create(1 << 20)
        ours, self.socket = socket.socketpair()
        self.socket.settimeout(10)
        hello = p.Hello(
            p.PROTOCOL_VERSION, "9.9", os.getpid(), bytes(16), self.pool.capacity_bytes, [bytes(32)]
        )
        socket.send_fds(self.socket, [p.encode(hello)], [self.pool.fd])
        self.client = NodeClient(ours, 5.0)
        self.frames = p.Frames()
        self.heard: list[p.Request] = []

    def hear(self) -> p.Request:
        """The next request."""
        while not self.heard:
            data = self.socket.recv(1 << 16)
            assert data, "the client hung up"
            self.heard += [p.decode_request(body) for body in self.frames.feed(data)]
        return self.heard.pop(0)

    def say(self, reply: p.Reply) -> None:
        self.socket.sendall(p.encode(reply))

    def close(self) -> None:
        self.client.close()
        self.socket.close()
        self.pool.close()


@pytest.fixture
def node() -> Iterator[PlayedNode]:
    node = PlayedNode()
    with contextlib.closing(node):
        yield node


class TestCalls:
    def test_answers_come_in_any_order(self, node: PlayedNode) -> None:
        calls = [node.client.match(KEYS, [0], ["a/b"]) for _ in range(3)]
        assert [call.ready() for call in calls] == [False] * 3
        requests = [node.hear() for _ in calls]
        for request in reversed(requests):
            assert isinstance(request, p.Match)
            assert request.keys == b"".join(KEYS)
            node.say(p.Matched(request.id, request.id + 100, b"", b""))
        assert [call.wait(5).lease for call in calls] == [call.id + 100 for call in calls]
        assert not node.client._calls

    def test_one_thread_receives_for_all(self, node: PlayedNode) -> None:
        calls = [node.client.match(KEYS, [0], []) for _ in range(8)]
        leases: dict[int, int] = {}
        threads = [
            threading.Thread(target=lambda c=call: leases.update({c.id: c.wait(10).lease}))
            for call in calls
        ]
        for thread in threads:
            thread.start()
        for _ in calls:
            request = node.hear()
            node.say(p.Matched(request.id, request.id, b"", b""))  # type: ignore[union-attr]
        for thread in threads:
            thread.join(10)
        assert leases == {call.id: call.id for call in calls}

    def test_a_deadline_is_kept_while_another_thread_waits_longer(self, node: PlayedNode) -> None:
        patient, hurried = node.client.match(KEYS, [0], []), node.client.match(KEYS, [0], [])
        thread = threading.Thread(target=lambda: patient.wait(20))
        thread.start()
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="within 5 ms"):
            hurried.wait(0.005)
        assert time.monotonic() - begun < 5
        node.say(p.Matched(patient.id, 1, b"", b""))
        thread.join(10)
        assert not thread.is_alive()

    def test_a_late_lease_is_released(self, node: PlayedNode) -> None:
        late, other = node.client.match(KEYS, [0], []), node.client.match(KEYS, [0], [])
        with pytest.raises(DeadlineExceeded):
            late.wait(0)
        node.hear(), node.hear()
        node.say(p.Matched(late.id, 77, b"\0", bytes(8)))
        node.say(p.Matched(other.id, 78, b"\0", bytes(8)))
        assert other.wait(5).lease == 78
        assert node.hear() == p.Release(77, 0)
        assert not node.client._calls

    def test_an_abandoned_answer_that_had_come_is_given_back_too(self, node: PlayedNode) -> None:
        call = node.client.match(KEYS, [0], [])
        node.hear()
        node.say(p.Matched(call.id, 77, b"\0", bytes(8)))
        while not call.ready():
            pass
        call.abandon()
        assert node.hear() == p.Release(77, 0)

    def test_a_late_reservation_is_given_back_unwritten(self, node: PlayedNode) -> None:
        late = node.client.reserve(NAMESPACE, KEYS, 0, 0, template())
        other = node.client.match(KEYS, [0], [])
        late.abandon()
        node.hear(), node.hear()
        node.say(p.Reserved(late.id, 5, offsets_of(bytes(24)).tobytes()))
        node.say(p.Matched(other.id, 0, b"", b""))
        other.wait(5)
        assert node.hear() == p.Commit(0, 5, bytes(48))

    def test_what_the_node_refuses_is_raised(self, node: PlayedNode) -> None:
        for kind, expected in [
            ("UsageError", UsageError),
            ("Incompatible", Incompatible),
            ("ConfigError", KVStrataError),
            ("ValueError", KVStrataError),
            ("annotations", KVStrataError),
        ]:
            call = node.client.match(KEYS, [0], [])
            node.hear()
            node.say(p.Failed(call.id, kind, "no such lease"))
            with pytest.raises(expected, match="no such lease"):
                call.wait(5)

    def test_an_answer_of_another_kind(self, node: PlayedNode) -> None:
        call = node.client.match(KEYS, [0], [])
        node.say(p.Done(call.id, 1))
        with pytest.raises(Incompatible, match="Done"):
            call.wait(5)


class TestLoss:
    def test_the_node_hangs_up(self, node: PlayedNode) -> None:
        call = node.client.match(KEYS, [0], [])
        node.socket.close()
        with pytest.raises(NodeUnavailable):
            call.wait(5)
        with pytest.raises(NodeUnavailable):
            call.ready()
        with pytest.raises(NodeUnavailable):
            node.client.match(KEYS, [0], [])
        assert not node.client.alive
        node.client.release(5)
        node.client.record({})
        call.abandon()

    def test_an_answer_that_came_before_is_kept(self, node: PlayedNode) -> None:
        call = node.client.match(KEYS, [0], [])
        node.say(p.Matched(call.id, 3, b"", b""))
        while not call.ready():
            pass
        node.socket.close()
        with pytest.raises(NodeUnavailable):
            node.client.lookup(KEYS, [0])
        assert call.wait(5).lease == 3

    def test_garbage(self, node: PlayedNode) -> None:
        call = node.client.match(KEYS, [0], [])
        node.socket.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(NodeUnavailable, match="a frame of"):
            call.wait(5)

    def test_close_wakes_who_waits(self, node: PlayedNode) -> None:
        call = node.client.match(KEYS, [0], [])
        raised: list[Exception] = []

        def wait() -> None:
            try:
                call.wait(60)
            except KVStrataError as error:
                raised.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while not node.client._receiving:
            time.sleep(0)
        node.client.close()
        thread.join(10)
        assert not thread.is_alive()
        assert isinstance(raised[0], NodeUnavailable)
        node.hear()
        assert node.hear() == p.Bye()
        node.client.close()

    def test_a_node_that_takes_nothing_costs_no_wait_and_no_connection(
        self, node: PlayedNode
    ) -> None:
        begun = time.monotonic()
        calls = []
        with pytest.raises(NodeUnavailable, match="takes no messages"):  # noqa: PT012
            while True:
                calls.append(node.client.match(KEYS * 1000, [0], []))
        assert node.client._connection.num_unsent >= MAX_UNSENT_BYTES
        assert time.monotonic() - begun < 5
        assert node.client.alive
        # It comes back: every message arrives, whole.
        waiting = threading.Thread(target=lambda: calls[-1].wait(10))
        waiting.start()
        for call in calls:
            request = node.hear()
            assert isinstance(request, p.Match)
            assert request.id == call.id
        node.say(p.Matched(calls[-1].id, 0, b"", b""))
        waiting.join(10)
        assert node.client.match(KEYS, [0], []).ready() is False

    def test_a_forked_child_says_nothing_in_our_name(self, node: PlayedNode) -> None:
        pid = os.fork()
        if not pid:
            code = 3
            with contextlib.suppress(NodeUnavailable):
                node.client.match(KEYS, [0], [])
                code = 4
            node.client.close()
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        call = node.client.match(KEYS, [0], [])
        assert isinstance(node.hear(), p.Match)
        node.say(p.Matched(call.id, 1, b"", b""))
        assert call.wait(5).lease == 1


class TestHello:
    def greet(self, *frames: bytes, fds: int = 0, hang_up: bool = True) -> None:
        """Connect to a node that says this; raises what the client raises."""
        ours, theirs = socket.socketpair()
        pool = Pool.create(4096)
        before = set(os.listdir("/proc/self/fd"))
        try:
            if frames:
                socket.send_fds(theirs, [b"".join(frames)], [pool.fd] * fds)
            if hang_up:
                theirs.close()
            NodeClient(ours, 0.05).close()
        finally:
            ours.close()
            theirs.close()
            assert set(os.listdir("/proc/self/fd")) <= before
            pool.close()

    def hello(self, version: int = p.PROTOCOL_VERSION, *more: object) -> bytes:
        body = msgspec.msgpack.encode(
            ["hello", version, "7.7.7", 1, bytes(16), 4096, [bytes(32)], *more]
        )
        return len(body).to_bytes(4, "little") + body

    def test_ours(self) -> None:
        self.greet(self.hello(), fds=1, hang_up=False)

    @pytest.mark.parametrize("more", [(), ("a field of the future", {"x": 1})])
    def test_another_version_is_refused_naming_both(self, more: tuple[object, ...]) -> None:
        with pytest.raises(Incompatible, match=r"7\.7\.7.*protocol 99, this client .* 2;"):
            self.greet(self.hello(99, *more), fds=1)

    def test_no_node(self) -> None:
        for words in (b"\x00", p.encode(p.Bye())[4:], b"\xff" * 9, b"\x91\xa5hello"):
            frame = len(words).to_bytes(4, "little") + words
            with pytest.raises(Incompatible, match="no node"):
                self.greet(frame, fds=1)
        with pytest.raises(Incompatible, match="no pool"):
            self.greet(self.hello())
        with pytest.raises(Incompatible, match="no pool"):
            self.greet(self.hello(), fds=2)
        with pytest.raises(Incompatible, match="announced"):
            self.greet(self.hello().replace(b"\xcd\x10\x00", b"\xcd\x20\x00"), fds=1)
        with pytest.raises(NodeUnavailable, match="hung up"):
            self.greet()
        with pytest.raises(NodeUnavailable, match="says nothing"):
            self.greet(hang_up=False)
        with pytest.raises(NodeUnavailable, match="says nothing"):
            self.greet(self.hello()[:10], fds=1, hang_up=False)
