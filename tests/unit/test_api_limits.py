"""What clients may take of the API, and what hostile ones cannot: no wait without an end."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.apis import Rig

from kvstrata.control import guard, http, link
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient

SOON_S = 0.3
HEAD = b"POST /v1/lookup HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        yield Path(name)


@pytest.fixture
def rig(folder: Path) -> Iterator[Rig]:
    rig = Rig(folder)
    yield rig
    rig.close()


def all_of(raw: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    pieces = []
    try:
        while piece := raw.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def dripped(raw: socket.socket, piece: bytes, count: int, pause_s: float = 0.0) -> int:
    """How often a piece can be sent, at most so often."""
    for number in range(count):
        try:
            raw.sendall(piece)
        except (ConnectionResetError, BrokenPipeError):
            return number
        time.sleep(pause_s)
    return count


def until(true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_a_head_that_does_not_end_is_hung_up_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_S", SOON_S)
    for begin in (b"", b"GET /v1/health HTTP/1.1\r\nHost: loc"):
        with rig.raw() as raw:
            raw.sendall(begin)
            assert all_of(raw) == b""
    with rig.raw() as raw:  # a second request on a connection that stands
        raw.sendall(b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in raw.recv(4096)
        raw.sendall(b"GET /v1/he")
        assert all_of(raw) == b""


def test_a_head_that_drips_is_hung_up_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte in time, the whole never: the deadline is the head's, not a byte's."""
    monkeypatch.setattr(http, "HEAD_S", SOON_S)
    with rig.raw() as raw:
        assert dripped(raw, b"X", 3000, 0.01) < 3000


def test_a_body_that_drips_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_S", SOON_S)
    for length in (b"Content-Length: 1000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{"):
        with rig.raw() as raw:
            raw.sendall(HEAD + length)
            answer = all_of(raw)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"application/problem+json" in answer


def test_a_body_that_is_too_long_is_not_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 100_000)
    with rig.raw() as raw:  # announced
        raw.sendall(HEAD + b"Content-Length: 100001\r\n\r\n")
        assert all_of(raw).startswith(b"HTTP/1.1 413")
    with rig.raw() as raw:  # and not
        raw.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"2710\r\n" + b" " * 10_000 + b"\r\n"
        assert dripped(raw, piece, 100_000) < 100_000
    with rig.raw() as raw:
        raw.sendall(HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n")
        assert all_of(raw).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))
    fits = b'{"tokens": []' + b" " * 99_000 + b"}"
    kind = {"Content-Type": "application/json"}
    assert rig.ask("POST", "/v1/lookup", fits, kind).problem["field"] == "body.model"


def test_all_bodies_together_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODIES_BYTES", 50_000)
    with rig.raw() as slow:
        slow.sendall(HEAD + b"Content-Length: 40000\r\n\r\n" + b" " * 39_999)
        body = b" " * 20_000 + b"{}"
        kind = {"Content-Type": "application/json"}
        until(lambda: rig.ask("POST", "/v1/lookup", body, kind).status == 503)
        assert rig.ask("GET", "/v1/health").status == 200
        slow.sendall(b"x")
        assert b"400 Bad Request" in slow.recv(4096)
    assert rig.ask("POST", "/v1/lookup", body, kind).status == 422, "what is over is given back"


def test_what_is_no_http_gets_a_problem(rig: Rig) -> None:
    long = b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000
    for garbage in (b"garbage\r\n\r\n", b"\x00" * 100, b"GET / HTTP/1.1\r\n: x\r\n\r\n", long):
        with rig.raw() as raw:
            raw.sendall(garbage)
            answer = all_of(raw)
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"application/problem+json" in answer


def test_an_answer_that_nobody_reads_holds_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "STALLED_S", SOON_S)
    made = http.Connection.connection_made

    def narrow(connection: http.Connection, transport: asyncio.Transport) -> None:
        ours: socket.socket = transport.get_extra_info("socket")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(connection, transport)

    monkeypatch.setattr(http.Connection, "connection_made", narrow)
    assert rig.node is not None
    node = rig.node
    large = {"counters": {f"name {n} {'x' * 200}": 1.0 for n in range(10_000)}}
    status = node.node.status
    monkeypatch.setitem(
        node.node._handlers,
        p.Status,
        lambda client, message: p.State(message.id, {**status(client, message).state, **large}),
    )
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", rig.port))
        raw.sendall(b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(10 * SOON_S)  # it is not read meanwhile; however long, no more would come
        raw.settimeout(30)
        came = len(all_of(raw))
    assert came < 2_000_000, "it was hung up on before the end"


def test_more_connections_than_are_served_are_hung_up_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 20)
    held = [rig.raw() for _ in range(20)]
    try:
        until(lambda: _refused(rig))
    finally:
        for one in held:
            one.close()
    until(lambda: not _refused(rig))


def _refused(rig: Rig) -> bool:
    with rig.raw() as raw:
        try:
            raw.sendall(b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return not all_of(raw)
        except (ConnectionResetError, BrokenPipeError):
            return True


def test_more_requests_than_are_served_are_told_to_come_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_REQUESTS", 2)
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def slow(client: NodeClient) -> dict[str, object]:
        begun.release()
        assert go_on.wait(60)
        raise AssertionError("and it fails")

    monkeypatch.setattr(NodeClient, "status", slow)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(rig.ask, "GET", "/v1/status") for _ in range(2)]
        for _ in waiting:
            assert begun.acquire(timeout=30)
        answer = rig.ask("GET", "/v1/health")
        assert answer.problem["status"] == 503
        assert answer.headers["retry-after"]
        go_on.set()
        problems = [one.result().problem for one in waiting]
    # A mistake of ours is a problem, too, and says nothing of itself.
    assert [problem["status"] for problem in problems] == [500, 500]
    assert "and it fails" not in str(problems)
    assert rig.ask("GET", "/v1/health").status == 200


def test_what_waits_long_keeps_nobody_from_looking(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def flush(client: NodeClient, timeout_s: float) -> None:
        begun.release()
        assert go_on.wait(60)

    monkeypatch.setattr(NodeClient, "flush", flush)
    monkeypatch.setattr(link, "MAX_WAITING", link.LONG_THREADS)
    with ThreadPoolExecutor(link.LONG_THREADS) as pool:
        waiting = [pool.submit(rig.ask, "POST", "/v1/flush") for _ in range(link.LONG_THREADS)]
        for _ in waiting:
            assert begun.acquire(timeout=30)
        assert rig.ask("GET", "/v1/status").status == 200
        assert rig.ask("POST", "/v1/flush").problem["kind"] == "Busy"
        go_on.set()
        assert {one.result().status for one in waiting} == {200}


def test_without_a_node_it_says_so_until_there_is_one(folder: Path) -> None:
    rig = Rig(folder, lives=False)
    try:
        for method, path, body in [
            ("GET", "/v1/ready", None),
            ("GET", "/v1/status", None),
            ("POST", "/v1/flush", None),
            ("POST", "/v1/lookup", {"tokens": [1]}),
        ]:
            answer = rig.ask(method, path, body)
            assert (answer.problem["status"], answer.problem["kind"]) == (503, "NodeUnavailable")
        assert rig.ask("GET", "/v1/health").status == 200
        for _ in range(2):
            rig.start_node()
            until(lambda: rig.ask("GET", "/v1/ready").status == 200)
            rig.stop_node()
            assert rig.ask("GET", "/v1/ready").problem["status"] == 503
    finally:
        rig.close()


def test_a_node_that_was_replaced_is_found_at_once(rig: Rig) -> None:
    assert rig.ask("POST", "/v1/flush").status == 200
    rig.stop_node()
    rig.start_node()
    assert rig.ask("POST", "/v1/flush").status == 200, "nobody asked meanwhile, nobody is refused"


def test_a_node_that_hangs_is_waited_for_until_a_deadline(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "ANSWER_S", SOON_S)
    assert rig.node is not None
    hangs = threading.Event()
    node = rig.node
    begun = threading.Event()

    def hang() -> None:
        begun.set()
        hangs.wait(60)

    node._loop.call_soon_threadsafe(hang)
    assert begun.wait(30)
    try:
        problem = rig.ask("GET", "/v1/status").problem
        assert problem["status"] in (503, 504)
        assert rig.ask("GET", "/v1/health").status == 200
    finally:
        hangs.set()
    until(lambda: rig.ask("GET", "/v1/status").status == 200)


def test_a_thousand_connections_that_say_nothing_keep_nobody_out(rig: Rig) -> None:
    held = []
    try:
        for _ in range(1000):
            held.append(rig.raw())
        for _ in range(20):
            assert rig.ask("GET", "/v1/status").status == 200
    finally:
        for one in held:
            one.close()


@pytest.mark.parametrize("path", ["/v1/lookup", "/v1/health"])
def test_a_body_whose_length_is_told_in_two_ways_is_refused(rig: Rig, path: str) -> None:
    """What stands before the API may have read one of them, and it the other."""
    head = HEAD.replace(b"/v1/lookup", path.encode())
    body = b"4\r\n{}  \r\n0\r\n\r\n"
    for both in (
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 14\r\n\r\n",
    ):
        with rig.raw() as raw:
            raw.sendall(head + both + body)
            answer = all_of(raw)
            assert answer.startswith(b"HTTP/1.1 400")
            assert answer.count(b"HTTP/1.1") == 1, "and nothing more is read from it"
            assert b"application/problem+json" in answer
    with rig.raw() as raw:
        raw.sendall(HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + body)
        assert not all_of(raw).startswith(b"HTTP/1.1 400")
