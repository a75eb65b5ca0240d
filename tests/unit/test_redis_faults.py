"""What goes wrong with a Redis, really: passwords, rights, certificates, room, moves, time."""

from __future__ import annotations

import inspect
import logging
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
import trustme
from tests.support.redis_tiers import every_verb, rule_on_the_page, tier_at, timed

from kvstrata.errors import ReadOnly, TierFull, TierUnavailable
from kvstrata.testing.servers.redis import RedisServer, installed
from kvstrata.testing.shared import MARGIN_S, name
from kvstrata.testing.stores import HIT, MISS, PAGE, empty, filled, has, put, read_one, write
from kvstrata.tiers.redis import client
from kvstrata.tiers.redis.connections import Buffers, PlainConnection
from kvstrata.tiers.redis.tier import RedisTier

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

MIB = 1 << 20
SECRET = "hunter2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("server") / "redis")
    yield server
    server.close()


@pytest.fixture
def admin(server: RedisServer) -> Iterator[redis.Redis]:
    with server.admin() as admin:
        admin.flushall()
        yield admin


@pytest.fixture
def tier(server: RedisServer, admin: redis.Redis) -> Iterator[RedisTier]:
    tier = tier_at(server.url)
    yield tier
    tier.close()


class TestWho:
    @pytest.fixture
    def port(self, server: RedisServer, admin: redis.Redis) -> Iterator[int]:
        admin.execute_command(*rule_on_the_page(SECRET))
        admin.acl_setuser("reader", enabled=True, passwords=[f"+{SECRET}"],
                          keys=["*"], commands=["+get", "+getrange"])  # fmt: skip
        yield server.port
        admin.acl_deluser("kvstrata", "reader")

    def test_the_rule_on_the_page_is_enough(self, port: int) -> None:
        for options in ({}, {"ttl_s": 600.0}):
            tier = tier_at(
                f"redis://kvstrata:{SECRET}@127.0.0.1:{port}", piece_bytes=3 * PAGE, **options
            )
            every_verb(tier)
            tier.close()

    def test_a_wrong_password_is_called_one(
        self, port: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        tier = tier_at(f"redis://kvstrata:{SECRET}x@127.0.0.1:{port}")
        with pytest.raises(TierUnavailable) as caught:
            tier.epoch()
        tier.close()
        said = f"redis at 127.0.0.1:{port} does not let user 'kvstrata' in: .*redis.url"
        assert re.search(said, str(caught.value))
        assert SECRET not in str(caught.value) + repr(caught.value) + caplog.text

    def test_no_password_where_one_is_needed(self, server: RedisServer) -> None:
        with server.admin() as admin:
            admin.config_set("requirepass", SECRET)
            try:
                tier = tier_at(server.url)
                with pytest.raises(TierUnavailable, match="does not let the default user in: "):
                    tier.stat([name(1)])
                tier.close()
                tier = tier_at(f"redis://:{SECRET}@127.0.0.1:{server.port}")
                every_verb(tier)
                tier.close()
            finally:
                admin.config_set("requirepass", "")

    def test_a_right_that_is_missing_is_named(self, port: int) -> None:
        tier = tier_at(f"redis://reader:{SECRET}@127.0.0.1:{port}")
        assert has(tier, [name(1)]) == [MISS]
        assert tier.read([name(1)], [empty(PAGE)]) == [MISS]
        for change in (
            lambda: tier.write([put(name(1), filled(PAGE, 1), True)]),
            lambda: tier.delete([name(1)]),
            lambda: tier.forget(1),
            tier.begin_epoch,
            tier.epoch,  # which it would have to begin
        ):
            with pytest.raises(ReadOnly, match=r"'reader' write: .* command; docs/redis.md"):
                change()
        tier.close()

    def test_who_may_not_read_is_not_said_to_read(self, port: int, admin: redis.Redis) -> None:
        admin.execute_command("ACL", "SETUSER", "reader", "-getrange")
        tier = tier_at(f"redis://reader:{SECRET}@127.0.0.1:{port}")
        with pytest.raises(TierUnavailable, match=r"needs: .*'getrange' .*docs/redis.md") as caught:
            tier.stat([name(1)])
        assert not isinstance(caught.value, ReadOnly)
        tier.close()


NODE, ELSEWHERE = "node@example.org", "elsewhere.example.org"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates and their keys, all of one authority."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for who in ("127.0.0.1", NODE, ELSEWHERE):
        issued = authority.issue_cert(who)
        issued.private_key_pem.write_to_path(str(folder / f"{who}.key"))
        chain = b"".join(one.bytes() for one in issued.cert_chain_pems)
        (folder / f"{who}.pem").write_bytes(chain)
    return folder


def encrypted(files: Path, who: str, folder: Path) -> RedisServer:
    """A server that takes TLS only, and asks for a client's certificate too."""
    return RedisServer(
        folder,
        ["--port", "0", "--tls-port", "PORT", "--tls-ca-cert-file", f"{files}/ca.pem",
         "--tls-cert-file", f"{files}/{who}.pem", "--tls-key-file", f"{files}/{who}.key"],
        ssl=True, ssl_cert_reqs="none",
        ssl_certfile=f"{files}/{NODE}.pem", ssl_keyfile=f"{files}/{NODE}.key",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tls(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = encrypted(files, "127.0.0.1", tmp_path_factory.mktemp("tls") / "redis")
    yield server
    server.close()


class TestEncrypted:
    def mine(self, files: Path) -> str:
        return f"cert_file={files}/{NODE}.pem&key_file={files}/{NODE}.key"

    def test_every_verb_and_large_objects(self, files: Path, tls: RedisServer) -> None:
        url = f"rediss://127.0.0.1:{tls.port}?ca_file={files}/ca.pem&{self.mine(files)}"
        tier = tier_at(url, piece_bytes=3 * PAGE)
        every_verb(tier)
        tier.close()
        tier, data = tier_at(url, piece_bytes=2 * MIB), filled(5 * MIB, 1)
        assert write(tier, [(name(1), data)]) == [HIT]
        assert read_one(tier, name(1), 5 * MIB) == (HIT, bytes(data))
        tier.close()

    def test_what_is_missing_is_said(self, files: Path, tls: RedisServer) -> None:
        ended = "certificate required|[Cc]onnection (was )?(closed|reset)|Broken pipe|EOF"
        for url, said in (
            (f"rediss://127.0.0.1:{tls.port}?{self.mine(files)}", "CERTIFICATE_VERIFY_FAILED"),
            (f"rediss://127.0.0.1:{tls.port}?ca_file={files}/ca.pem", ended),
            (f"redis://127.0.0.1:{tls.port}", ended),
        ):
            tier = tier_at(url)
            with pytest.raises(TierUnavailable, match=said):
                tier.epoch()
            tier.close()

    def test_another_hosts_certificate_is_refused(
        self, files: Path, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        server = encrypted(files, ELSEWHERE, tmp_path / "redis")
        request.addfinalizer(server.close)
        tier = tier_at(
            f"rediss://127.0.0.1:{server.port}?ca_file={files}/ca.pem&{self.mine(files)}"
        )
        with pytest.raises(TierUnavailable, match=r"certificate is not valid for '127\.0\.0\.1'"):
            tier.epoch()
        tier.close()

    def test_a_file_that_is_not_there(self, files: Path, tls: RedisServer) -> None:
        tier = tier_at(f"rediss://127.0.0.1:{tls.port}?ca_file={files}/none.pem")
        with pytest.raises(TierUnavailable, match="No such file"):
            tier.epoch()
        tier.close()


class TestRoom:
    def test_no_room_is_said_as_such_and_leaves_nothing(
        self, server: RedisServer, admin: redis.Redis
    ) -> None:
        tier = tier_at(server.url, piece_bytes=MIB)
        epoch = tier.epoch()
        write(tier, [(name(1), filled(PAGE, 1))])
        try:
            assert server.fill()
            with pytest.raises(TierFull, match=r"takes no more: .*maxmemory"):
                [tier.write([put(name(i), filled(3 * MIB, 1), True)]) for i in range(2, 9)]
            assert read_one(tier, name(1), PAGE) == (HIT, bytes(filled(PAGE, 1)))
            assert tier.epoch() == epoch
            whole = [number for number in range(2, 9) if has(tier, [name(number)]) == [HIT]]
            assert admin.dbsize() == 2 + 3 * len(whole), "pieces of what could not be written"
            with pytest.raises(TierFull):
                write(tier, [(name(1), filled(3 * MIB, 1))])
            assert tier.delete([name(1)]) == [HIT], "room can be made"
        finally:
            server.make_room()
        tier.close()

    def test_what_was_evicted_is_a_miss(
        self, server: RedisServer, tier: RedisTier, admin: redis.Redis
    ) -> None:
        names = [name(number) for number in range(64)]
        try:
            admin.config_set("maxmemory-policy", "allkeys-lru")
            admin.config_set("maxmemory", admin.info("memory")["used_memory"] + 8 * MIB)
            for one in names:
                assert write(tier, [(one, filled(MIB // 2, 1))]) == [HIT]
            answers = tier.read(names, [empty(MIB // 2)] * 64)
            assert MISS in answers
            assert set(answers) == {MISS, MIB // 2}
            assert admin.info("stats")["evicted_keys"] >= answers.count(MISS)
        finally:
            server.make_room()

    def test_a_server_that_cannot_save_is_read_on(
        self, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        """Redis takes no writes then, unless it is told otherwise."""
        server = RedisServer(tmp_path / "redis")
        request.addfinalizer(server.close)
        tier = tier_at(server.url)
        write(tier, [(name(1), filled(PAGE, 1))])
        (tmp_path / "redis" / "dump.rdb").mkdir()
        with server.admin() as admin:
            admin.config_set("save", "3600 1")
            admin.bgsave()
            while admin.info("persistence")["rdb_last_bgsave_status"] == "ok":
                time.sleep(0.01)
        with pytest.raises(TierFull, match="MISCONF"):
            tier.write([put(name(2), filled(PAGE, 1), True)])
        assert read_one(tier, name(1), PAGE)[0] is HIT
        tier.close()


class Relay:
    """Between a tier and a server: lets a little through, now and then."""

    def __init__(self, port: int, nbytes: int, pause_s: float) -> None:
        self._to, self._nbytes, self._pause_s = port, nbytes, pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            self._sockets += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(self._nbytes):
                sink.sendall(data)
                if len(data) == self._nbytes:
                    time.sleep(self._pause_s)
        except OSError:
            return

    def close(self) -> None:
        for one in (self._listener, *self._sockets):
            one.close()


class TestTime:
    """Every call ends in its time, whatever the server does, and however many wait."""

    SOON_S = 1.0

    def test_a_server_that_trickles(self, server: RedisServer, tier: RedisTier) -> None:
        write(tier, [(name(1), filled(4 * MIB, 1))])
        relay = Relay(server.port, 4096, 0.05)
        slow = tier_at(f"redis://127.0.0.1:{relay.port}", timeout_s=self.SOON_S)
        assert has(slow, [name(1)]) == [HIT], "what is small comes through"
        took = timed(lambda: slow.read([name(1)], [empty(4 * MIB)]))
        assert self.SOON_S * 0.9 < took < self.SOON_S + MARGIN_S
        large = put(name(2), filled(64 * MIB, 1))
        took = timed(lambda: slow.write([large]))
        assert took < self.SOON_S + MARGIN_S
        slow.close()
        relay.close()
        assert has(tier, [name(2)]) == [MISS]


def test_nothing_is_asked_before_the_first_call() -> None:
    """So a node that starts before its Redis has it later."""
    tier = tier_at("redis+cluster://127.0.0.1:1")
    with pytest.raises(TierUnavailable, match=r"redis at 127\.0\.0\.1:1: .*[Rr]efused"):
        tier.epoch()
    tier.close()


def test_a_child_has_connections_of_its_own(tier: RedisTier) -> None:
    data = filled(PAGE, 1)
    write(tier, [(name(1), data)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if not child:
        good = all(read_one(tier, name(1), PAGE) == (HIT, bytes(data)) for _ in range(200))
        os._exit(0 if good else 1)
    assert all(read_one(tier, name(1), PAGE) == (HIT, bytes(data)) for _ in range(200))
    _, status = os.waitpid(child, 0)
    assert status == 0


def test_a_close_while_others_use_it(server: RedisServer) -> None:
    tier = tier_at(server.url)
    write(tier, [(name(1), filled(MIB, 1))])
    wanted = (HIT, bytes(filled(MIB, 1)))

    def use(_: int) -> int:
        count = 0
        while True:
            try:
                assert read_one(tier, name(1), MIB) == wanted
            except TierUnavailable:
                return count
            count += 1

    with ThreadPoolExecutor(4) as threads:
        work = [threads.submit(use, number) for number in range(4)]
        time.sleep(0.2)
        tier.close()
        assert all(one.result(timeout=10) for one in work)


def test_every_error_of_the_library_is_translated() -> None:
    found = [
        one
        for _, one in inspect.getmembers(redis.exceptions, inspect.isclass)
        if issubclass(one, Exception)
    ]
    assert len(found) > 20
    not_for_us = {"IncorrectPolicyType", "ChildDeadlockedError"}  # our own mistakes
    for error in found:
        assert issubclass(error, client._ERRORS) or error.__name__ in not_for_us, error


def test_a_connection_that_another_thread_closes_while_it_is_looked_at(
    server: RedisServer,
) -> None:
    """As a cluster's client does, whose servers have changed; redis-py would raise a TypeError."""
    port = urlsplit(server.url).port
    connection = PlainConnection(host="127.0.0.1", port=port, socket_timeout=5.0, protocol=2)
    connection.connect()
    sock = connection._sock
    sock.sendall(b"PING\r\n")
    sock.recv(1, socket.MSG_PEEK)  # the answer is there, so there is something to be looked at

    class Closing:
        """Is closed once it has been looked at."""

        def fileno(self) -> int:
            number: int = sock.fileno()
            connection._parser.on_disconnect()
            return number

    connection._parser._sock = Closing()
    with pytest.raises(redis.ConnectionError):
        connection.can_read()
    connection.disconnect()
    connection.connect()
    assert not connection.can_read()
    connection.disconnect()


@pytest.mark.parametrize(
    "answer",
    [b":5\r\n", b"+OK\r\n", b"$5x\r\n", b"$-2\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"\r\n"],
)
def test_what_is_no_value_ends_the_connection(answer: bytes) -> None:
    """Of what follows it nobody knows what it is an answer to."""
    ours, theirs = socket.socketpair()
    connection = PlainConnection(socket_timeout=5.0)
    connection._sock, connection._into = ours, Buffers([memoryview(bytearray(PAGE))])
    theirs.sendall(answer)
    with pytest.raises(redis.InvalidResponse, match="no value, but"):
        connection.read_response()
    assert ours.fileno() < 0
    theirs.close()
