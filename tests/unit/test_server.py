"""A node behind sockets: garbage, slow readers, ends of connections, descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.nodes import NAMESPACE, ORDER, RAW, chunk_keys, make_node, payload, template

from kvstrata.config import Config, load_config
from kvstrata.errors import Incompatible, KVStrataError, NodeUnavailable, UsageError
from kvstrata.node.operating.watching import MOST_OF_ONE
from kvstrata.node.process import server as server_module
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.process.server import MAX_AWAITS, MAX_LATE, MAX_LATE_BYTES
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

KEYS = chunk_keys(3)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[InProcessNode]:
    def make(config: Config) -> Any:
        return make_node(slots=10)

    config = load_config(environ={}, overrides={"secret_file": str(tmp_path / "secret")})
    with InProcessNode(config, make) as node:
        yield node
        node.check_integrity()


def store(client: NodeClient, keys: list[bytes]) -> int:
    reserved = client.reserve(NAMESPACE, keys, 0, 0, template()).wait(5)
    sums = []
    for key, offset in zip(keys, offsets_of(reserved.offsets), strict=True):
        client.pool.view(offset + HEADER_BYTES, RAW)[:] = payload(key)
        sums.append(checksum(payload(key)))
    count = client.commit(reserved.reservation, sums).wait(5).count
    assert isinstance(count, int)
    return count


def raw_client(node: InProcessNode) -> socket.socket:
    """A socket whose hello has been read."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    node.run(lambda: node.server.adopt(theirs))
    _, fds, _, _ = socket.recv_fds(ours, 4096, 4)
    for fd in fds:
        os.close(fd)
    return ours


def holdings(client: NodeClient) -> tuple[int, int]:
    leases = client.status()["leases"]
    return leases["count"], leases["reservations"]


def wait_until(client: NodeClient, expected: tuple[int, int]) -> None:
    for _ in range(2000):
        if holdings(client) == expected:
            return
    raise AssertionError(f"{holdings(client)} is not {expected}")


def ended(connected: socket.socket) -> bool:
    try:
        return connected.recv(4096) == b""
    except ConnectionResetError:
        return True


class TestEnds:
    def test_bye_frees(self, node: InProcessNode) -> None:
        watcher, client = node.connect(), node.connect()
        store(client, KEYS)
        client.match(KEYS, [0], [ORDER]).wait(5)
        client.reserve(NAMESPACE, chunk_keys(2, 1), 0, 0, template()).wait(5)
        assert holdings(watcher) == (1, 1)
        client.close()
        wait_until(watcher, (0, 0))
        watcher.close()

    def test_a_closed_socket_of_a_living_process_keeps(self, node: InProcessNode) -> None:
        watcher, client = node.connect(), node.connect()
        store(client, KEYS)
        client.match(KEYS, [0], [ORDER]).wait(5)
        client.reserve(NAMESPACE, chunk_keys(2, 1), 0, 0, template()).wait(5)
        client._connection.lose("the cable was cut")
        client.close()
        for _ in range(100):
            assert holdings(watcher) == (1, 1)
        assert node.run(lambda: node.server.num_clients) == 2
        watcher.close()

    def test_an_answer_on_its_way_does_not_cut_off_the_last_words(
        self, node: InProcessNode
    ) -> None:
        watcher, client = node.connect(), node.connect()
        store(client, KEYS)
        client.match(KEYS, [0], [ORDER]).wait(5)
        assert holdings(watcher) == (1, 0)
        closing = threading.Thread(target=client.close)

        def answer() -> None:
            closing.start()
            time.sleep(0.1)  # the loop is busy, and has not read what was said
            for connection in list(node.server._connections):
                connection._send(p.Done(1 << 30, 0))

        node.run(answer)
        closing.join(5)
        deadline = time.monotonic() + 5.0
        while holdings(watcher) != (0, 0):
            assert time.monotonic() < deadline, "it never heard them"
        watcher.close()

    def test_nothing_is_heard_after_bye(self, node: InProcessNode) -> None:
        watcher, raw = node.connect(), raw_client(node)
        store(watcher, KEYS)
        match = p.encode(p.Match(1, b"".join(KEYS), [0], [ORDER]))
        raw.sendall(p.encode(p.Bye()) + match + match)
        assert ended(raw)
        assert holdings(watcher) == (0, 0)
        raw.close()
        watcher.close()

    def test_a_client_refused_by_its_user(
        self, node: InProcessNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        monkeypatch.setattr(struct, "unpack", lambda *_: (os.getpid(), 54321, 0))
        with pytest.raises(NodeUnavailable):
            node.connect()

    def test_without_pidfds_a_closed_socket_counts_as_death(
        self, node: InProcessNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(pid: int) -> int:
            raise OSError(errno.ENOSYS, "an old kernel")

        watcher = node.connect()
        monkeypatch.setattr(server_module, "SO_PEERPIDFD", 9999)
        monkeypatch.setattr(os, "pidfd_open", refuse)
        client = node.connect()
        store(client, KEYS)
        client.match(KEYS, [0], [ORDER]).wait(5)
        client._connection.lose("the cable was cut")
        wait_until(watcher, (0, 0))
        client.close()
        watcher.close()

    @pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EPERM])
    @pytest.mark.parametrize("of", ["socket", "process"])
    def test_who_cannot_be_watched_is_refused(
        self, node: InProcessNode, monkeypatch: pytest.MonkeyPatch, of: str, number: int
    ) -> None:
        """Only an old kernel is a reason to take a closed socket for a death."""

        def refuse(pid: int) -> int:
            raise OSError(number, os.strerror(number))

        def option(connected: socket.socket, level: int, name: int, *more: int) -> Any:
            if name == 77 and of == "socket":
                refuse(0)
            return plain(connected, level, 9999 if name == 77 else name, *more)

        plain = socket.SocketType.getsockopt
        before = set(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "getsockopt", option)
            if of == "process":
                patch.setattr(os, "pidfd_open", refuse)
            with pytest.raises(NodeUnavailable):
                node.connect()
        assert node.run(lambda: node.server.num_clients) == 0
        assert set(os.listdir("/proc/self/fd")) <= before
        client = node.connect()
        assert client.status()["counters"]['disconnects_total{why="unwatched"}'] == 1
        client.close()

    def test_a_process_that_is_dead_already_is_not_welcome(
        self, node: InProcessNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def gone(pid: int) -> int:
            raise ProcessLookupError(3, "no such process")

        monkeypatch.setattr(server_module, "SO_PEERPIDFD", 9999)
        monkeypatch.setattr(os, "pidfd_open", gone)
        with pytest.raises(NodeUnavailable):
            node.connect()
        assert node.run(lambda: node.server.num_clients) == 0

    def test_who_leaves_before_the_welcome_leaves_nothing_behind(self, node: InProcessNode) -> None:
        client = node.connect()
        before = set(os.listdir("/proc/self/fd"))
        ours, theirs = socket.socketpair()
        ours.close()
        node.run(lambda: node.server.adopt(theirs))
        assert set(os.listdir("/proc/self/fd")) == before
        assert node.run(lambda: node.server.num_clients) == 1
        client.close()

    def test_who_comes_as_the_node_ends_is_hung_up_on(self, node: InProcessNode) -> None:
        ours, theirs = socket.socketpair()

        async def come_and_go() -> None:
            node.server.adopt(theirs)
            await node.server.close()

        node.run(come_and_go)
        assert theirs.fileno() < 0, "left to the garbage collector"
        ours.settimeout(10.0)
        with contextlib.suppress(ConnectionResetError):
            while ours.recv(4096):  # the node's first word
                pass
        ours.close()

    def test_a_socket_that_breaks_as_it_is_taken_over_is_no_bug(self, node: InProcessNode) -> None:
        async def broken(*_: Any) -> Any:
            raise ConnectionResetError(errno.ECONNRESET, "gone")

        client = node.connect()
        before = set(os.listdir("/proc/self/fd"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node._loop, "connect_accepted_socket", broken)
            raw = raw_client(node)
            assert ended(raw)
            raw.close()
        assert set(os.listdir("/proc/self/fd")) == before
        assert node.run(lambda: node.server.num_clients) == 1
        assert 'bugs_total{where="a connection"}' not in client.status()["counters"]
        client.close()

    def test_who_comes_while_descriptors_lack_is_let_in_later(
        self,
        node: InProcessNode,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(server_module, "ACCEPT_AGAIN_S", 0.3)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        path = str(tmp_path / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        node.run(lambda: node.server.listen(listener))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            highest = max(map(int, os.listdir("/proc/self/fd")))
            fillers = [os.dup(0)]
            while fillers[-1] <= highest:
                fillers.append(os.dup(0))
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, hard))
                client.connect(path)
                deadline = time.monotonic() + 10
                while "cannot accept a client" not in caplog.text:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                for _ in range(50):
                    node.run(lambda: None)
                assert caplog.text.count("cannot accept a client") < 10, "it asks at every turn"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for one in fillers:
                    os.close(one)
            hello, (pool,), _, _ = socket.recv_fds(client, 4096, 1)
            assert hello
            os.close(pool)
        node.run(node.server.stop_listening)


class TestGarbage:
    @pytest.mark.parametrize(
        "data",
        [
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff\xff\xff\xff",
            b"\x01\x00\x00\x00\xc1",
            b"\x00\x00\x00\x00",
            p.encode(p.Done(1, 1)),
            p.encode(p.Flush(1))[:4] + b"\x92\xa5fluSh\x01",
        ],
    )
    def test_closes_that_connection_only(self, node: InProcessNode, data: bytes) -> None:
        client, raw = node.connect(), raw_client(node)
        raw.sendall(data)
        assert ended(raw)
        raw.close()
        assert store(client, KEYS) == 3
        assert client.status()["counters"]['disconnects_total{why="garbage"}'] == 1
        client.close()

    def test_a_process_that_was_dropped_has_no_fresh_caps(self, tmp_path: Path) -> None:
        """What it holds stays in force, for a copy may be running, and goes on to count."""
        config = load_config(environ={}, overrides={"secret_file": str(tmp_path / "secret")})
        with InProcessNode(config, lambda _: make_node(10, per_client=0.45)) as node:
            first = node.connect()
            store(first, KEYS)
            reserved = first.reserve(NAMESPACE, chunk_keys(3, 1), 0, 0, template()).wait(5)
            assert min(offsets_of(reserved.offsets)) >= 0
            assert len(first.match(KEYS, [0], [ORDER]).wait(5).tiers) == 3
            first._connection._socket.send(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(NodeUnavailable):
                first.status()
            second = node.connect()
            assert holdings(second) == (1, 1)
            reserved = second.reserve(NAMESPACE, chunk_keys(3, 2), 0, 0, template()).wait(5)
            assert [offset < 0 for offset in offsets_of(reserved.offsets)] == [False, True, True]
            assert offsets_of(reserved.offsets)[2] == p.REFUSED
            second.commit(reserved.reservation, [bytes(16)] * 3).wait(5)
            # What is leased already counts once for the process, whoever of it asks.
            assert len(second.match(KEYS, [0], [ORDER]).wait(5).tiers) == 3
            node.check_integrity()
            second.close()
            first.close()

    def test_a_malformed_request_is_answered(self, node: InProcessNode) -> None:
        client = node.connect()
        with pytest.raises(UsageError, match="parts"):
            client.match(KEYS, [], [ORDER]).wait(5)
        with pytest.raises(Incompatible, match="multiple of 32"):
            client.match([b"short"], [0], [ORDER]).wait(5)
        with pytest.raises(UsageError, match="no tier"):
            client.clear(tiers=["tape"])
        client.release(1 << 62)
        client.await_arrival(1 << 62, 1 << 62).abandon()
        client.release(-5, -7)
        assert store(client, KEYS) == 3
        assert client.status()["counters"]['requests_refused_total{request="match"}'] == 2
        client.close()

    @pytest.mark.parametrize(
        "request_",
        [
            p.Match(7, bytes(32), [(1 << 62) + number for number in range(4000)], [ORDER]),
            p.Clear(7, None, ["x" * (1 << 20)]),
        ],
    )
    def test_a_refusal_is_short_whatever_was_asked_for(
        self, node: InProcessNode, request_: p.Request
    ) -> None:
        client, raw = node.connect(), raw_client(node)
        raw.sendall(p.encode(request_))
        (body,) = p.Frames().feed(raw.recv(1 << 20))
        reply = p.decode_reply(body)
        assert isinstance(reply, p.Failed)
        assert (reply.id, reply.kind) == (7, "UsageError")
        raw.sendall(p.encode(p.Lookup(8, KEYS[0], [0])))
        assert raw.recv(1 << 20)
        raw.close()
        assert store(client, KEYS) == 3
        client.close()

    @pytest.mark.bugs
    def test_a_bug_is_logged_counted_and_answered(
        self,
        node: InProcessNode,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def broken(*_: Any) -> Any:
            raise ZeroDivisionError("oops")

        async def broken_later(*_: Any) -> Any:
            raise ZeroDivisionError("oops later")

        client = node.connect()
        monkeypatch.setitem(node.node._handlers, p.Lookup, broken)
        monkeypatch.setitem(node.node._handlers, p.Flush, broken_later)
        monkeypatch.setitem(node.node._handlers, p.Release, broken)
        with pytest.raises(KVStrataError, match="oops"):
            client.lookup(KEYS, [0])
        with pytest.raises(KVStrataError, match="oops later"):
            client.flush(5)
        client.release(5)
        counters = client.status()["counters"]
        assert [counters[f'bugs_total{{where="a {name}"}}'] for name in ("lookup", "flush")] == [
            1,
            1,
        ]
        assert counters['bugs_total{where="a release"}'] == 1
        assert "ZeroDivisionError: oops" in caplog.text
        client.close()


class TestMany:
    def test_a_client_that_stops_reading_stalls_nobody(self, node: InProcessNode) -> None:
        client, raw = node.connect(), raw_client(node)
        store(client, KEYS)
        raw.settimeout(0.2)
        status = p.encode(p.Status(1)) * 100
        sent = 0
        with pytest.raises(TimeoutError):  # noqa: PT012
            # Backpressure: the node stops reading from it rather than pile up answers.
            while sent < 64 << 20:
                sent += raw.send(status)
        for _ in range(100):
            matched = client.match(KEYS, [0], [ORDER]).wait(1)
            assert len(matched.tiers) == 3
            client.release(matched.lease)
        raw.settimeout(10)
        answers = p.Frames()
        count = 0
        while count < 1000:
            count += sum(1 for _ in answers.feed(raw.recv(1 << 20)))
        raw.close()
        client.close()

    def test_answers_that_nobody_reads_do_not_pile_up(self, node: InProcessNode) -> None:
        """Not even those to requests that came in one piece."""
        client, raw = node.connect(), raw_client(node)
        for _ in range(32):
            client.record({"outcome": "hit", "x": "y" * 8000})
        num_answers = len(client.status()["requests"])
        assert num_answers == 32
        raw.sendall(p.encode(p.Status(1)) * 2000)
        client.status()
        (slow,) = (
            one for one in node.run(lambda: node.server._connections) if one._full or one._bodies
        )
        assert node.run(lambda: slow._transport.get_write_buffer_size()) < 2 << 20
        answers, count = p.Frames(), 0
        while count < 2000:
            count += sum(1 for _ in answers.feed(raw.recv(1 << 20)))
        raw.close()
        client.close()

    def test_many_requests_in_one_piece_hold_up_nobody(self, node: InProcessNode) -> None:
        client, raw = node.connect(), raw_client(node)
        order: list[str] = []
        asked = node.node._handlers[p.Release]

        def slow(who: Any, message: p.Release) -> None:
            order.append("release")
            time.sleep(0.002)
            asked(who, message)

        def other(who: Any, message: p.Lookup) -> Any:
            order.append("lookup")
            return node.node.lookup(who, message)

        node.node._handlers[p.Release] = slow
        node.node._handlers[p.Lookup] = other
        raw.sendall(p.encode(p.Release(5)) * 500)
        while not order:
            time.sleep(0.001)
        client.lookup(KEYS, [0])
        assert order.index("lookup") < 400
        raw.close()
        client.close()

    @pytest.mark.parametrize("size", [32, 1 << 20])
    def test_answers_under_way_do_not_pile_up(self, node: InProcessNode, size: int) -> None:
        client, raw = node.connect(), raw_client(node)
        count, most = (2000, MAX_LATE) if size == 32 else (20, MAX_LATE_BYTES // size)
        waiting: list[asyncio.Future[p.Reply]] = []

        def late(who: Any, message: p.Clear) -> Any:
            waiting.append(asyncio.get_running_loop().create_future())
            waiting[-1].add_done_callback(lambda _: None)
            return waiting[-1]

        node.node._handlers[p.Clear] = late
        clear = p.encode(p.Clear(1, bytes(size)))
        sender = threading.Thread(target=raw.sendall, args=(clear * count,))
        sender.start()
        done = 0
        while done < count:
            under_way = 0
            while under_way < min(most, count - done):
                under_way = node.run(lambda: len(waiting))
            assert under_way <= most
            client.status()  # others are served
            done += under_way

            def answer() -> None:
                for one in waiting:
                    one.set_result(p.Done(1, 0))
                waiting.clear()

            node.run(answer)
        sender.join()
        answers, num = p.Frames(), 0
        while num < count:
            num += sum(1 for _ in answers.feed(raw.recv(1 << 20)))
        raw.close()
        client.close()

    def test_waits_for_a_lease_do_not_hold_up_its_release(self, node: InProcessNode) -> None:
        client, raw = node.connect(), raw_client(node)
        waiting: list[asyncio.Future[p.Reply]] = []

        def wait(who: Any, message: p.Await) -> Any:
            waiting.append(asyncio.get_running_loop().create_future())
            return waiting[-1]

        def release(who: Any, message: p.Release) -> None:
            for one in waiting:
                one.set_result(p.Arrived(1, 0, False, b""))

        node.node._handlers.update({p.Await: wait, p.Release: release})
        count = MAX_AWAITS + 1
        raw.sendall(p.encode(p.Await(1, 5, 0)) * count + p.encode(p.Release(5)))
        answers, replies = p.Frames(), list[p.Reply]()
        while len(replies) < count:
            replies += map(p.decode_reply, answers.feed(raw.recv(1 << 20)))
        (refused,) = (one for one in replies if isinstance(one, p.Failed))
        assert refused.message == f"{MAX_AWAITS} wait for leases on this connection already"
        raw.close()
        client.close()

    def test_who_has_gone_watches_no_more(self, node: InProcessNode) -> None:
        client, raw = node.connect(), raw_client(node)
        raw.sendall(p.encode(p.Watch(1, -1, 60.0)) * MOST_OF_ONE)
        watching = node.run(lambda: node.node.watching)
        while node.run(lambda: len(watching.journal._waiting)) < MOST_OF_ONE:
            pass
        raw.close()
        while node.run(lambda: len(node.server.tasks)):
            client.status()
        assert client.begin(p.Watch, p.Watched, -1, 0.01).wait(5).next == 0
        client.close()

    @pytest.mark.parametrize("answered", [True, False])
    def test_what_came_before_the_end_of_a_connection_counts(
        self, node: InProcessNode, answered: bool
    ) -> None:
        client, raw = node.connect(), raw_client(node)
        for _ in range(32):
            client.record({"outcome": "hit", "x": "y" * 8000})
        raw.sendall(p.encode(p.Reserve(1, NAMESPACE, b"".join(KEYS), 0, 0, template())))
        reply = p.decode_reply(next(p.Frames().feed(raw.recv(1 << 20))))
        assert isinstance(reply, p.Reserved)
        for key, offset in zip(KEYS, offsets_of(reply.offsets), strict=True):
            client.pool.view(offset + HEADER_BYTES, RAW)[:] = payload(key)
        sums = b"".join(checksum(payload(key)) for key in KEYS)
        requests = p.encode(p.Status(2)) * (1 if answered else 100)
        raw.sendall(requests + p.encode(p.Commit(3, reply.reservation, sums)) + p.encode(p.Bye()))
        if not answered:
            client.status()
        raw.close()
        wait_until(client, (0, 0))
        assert client.lookup(KEYS, [0]) == bytes(3)
        client.close()

    def test_descriptors_and_holdings_after_many_clients(self, node: InProcessNode) -> None:
        watcher = node.connect()
        store(watcher, KEYS)

        def come_and_go() -> None:
            client = node.connect()
            client.match(KEYS, [0], [ORDER]).wait(5)
            client.close()

        come_and_go()
        wait_until(watcher, (0, 0))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(200):
            come_and_go()
        wait_until(watcher, (0, 0))
        watcher.status()
        assert len(os.listdir("/proc/self/fd")) <= before
        assert node.run(lambda: node.server.num_clients) == 1
        watcher.close()

    def test_clients_in_many_threads(self, node: InProcessNode) -> None:
        wrong: list[BaseException] = []

        def work(number: int) -> None:
            try:
                client = node.connect()
                for turn in range(20):
                    keys = chunk_keys(1, 10 * number + turn % 3)
                    reserved = client.reserve(NAMESPACE, keys, 0, 0, template()).wait(10)
                    (offset,) = offsets_of(reserved.offsets)
                    if offset >= 0:
                        client.pool.view(offset + HEADER_BYTES, RAW)[:] = payload(keys[0])
                        client.commit(reserved.reservation, [checksum(payload(keys[0]))]).wait(10)
                    matched = client.match(keys, [0], [ORDER]).wait(10)
                    for found in offsets_of(matched.offsets):
                        data = bytes(client.pool.view(found + HEADER_BYTES, RAW))
                        assert data == payload(keys[0])
                    client.release(matched.lease)
                client.close()
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong


class TestLong:
    MANY = chunk_keys(p.MAX_KEYS + 7, 3)

    def test_many_keys_are_named_by_several_requests(self, node: InProcessNode) -> None:
        client = node.connect()
        store(client, KEYS)
        assert client.lookup([*self.MANY, *KEYS], [0]) == b"\xff" * len(self.MANY) + bytes(3)
        matched = client.match([*KEYS, *self.MANY], [0], [ORDER]).wait(5)
        assert matched.tiers == bytes(3)
        client.release(matched.lease)
        assert client.lookup([], [0]) == b""
        assert client.clear([]) == 0
        assert client.clear([*self.MANY, *KEYS]) == 3
        assert client.lookup(KEYS, [0]) == b"\xff" * 3
        client.close()

    def test_a_request_for_too_much_is_refused_in_words(self, node: InProcessNode) -> None:
        client = node.connect()
        packed = b"".join(self.MANY)
        for call in (
            client.begin(p.Clear, p.Done, packed, []),
            client.begin(p.Lookup, p.Found, packed, [0]),
        ):
            with pytest.raises(UsageError, match="of 32775 keys; 32768 at most: send several"):
                call.wait(5)
        with pytest.raises(UsageError, match="4097 chunks to reserve; 4096 at most"):
            client.reserve(NAMESPACE, self.MANY[:4097], 0, 0, template()).wait(5)
        with pytest.raises(UsageError, match="a record of"):
            client.record({"x": "y" * (64 << 10)})
        assert not client._calls
        assert client.lookup(KEYS, [0]) == b"\xff" * 3
        client.close()

    def test_others_are_served_in_the_middle(self, node: InProcessNode) -> None:
        client, other = node.connect(), node.connect()
        store(client, KEYS)
        packed = b"".join(self.MANY[: p.MAX_KEYS])
        calls: list[tuple[Any, ...]] = [
            (p.Lookup, p.Found, packed, [0, 1, 2, 3]),
            (p.Clear, p.Done, packed, []),
        ]
        for asked in calls:
            # Of one call a busy machine may let this thread see the end alone.
            for _ in range(50):
                call, served = client.begin(*asked), 0
                while not call.ready():
                    assert other.lookup(KEYS, [0]) == bytes(3)
                    served += 1
                if served > 2:
                    break
            assert served > 2
        other.close()
        client.close()
