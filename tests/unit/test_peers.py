"""Other nodes' host memory: asked over real sockets, by nodes of one deployment alone."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.attached import SECRET
from tests.support.certificates import certificates
from tests.support.members import Member
from tests.support.nodes import NAMESPACE, ORDER, OTHER, RAW, SLOT, chunk_keys

from kvstrata.config import load_config
from kvstrata.config.network import TRUSTED
from kvstrata.errors import ConfigError, Incompatible, TierUnavailable
from kvstrata.node.process import listening, loans
from kvstrata.node.process.listening import PeerServer
from kvstrata.node.service.names import Where
from kvstrata.tiers import one_peer
from kvstrata.tiers import peer as peer_tier
from kvstrata.tiers.base import Outcome, Stat
from kvstrata.tiers.peer import PeerTier
from kvstrata.transfer import peers as p
from kvstrata.transfer import tcp
from kvstrata.transfer.peers import NIXL
from kvstrata.transfer.tcp import Address, Channel


@pytest.fixture
def transport() -> str:
    """What bytes go by; a test that is parametrized with it says otherwise."""
    return "tcp"


@pytest.fixture
def fleet(
    tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Member]]:
    """Makes members, and ends them."""
    common = {}
    if transport == NIXL:
        pytest.importorskip("nixl_cu12")
        monkeypatch.setenv("UCX_NET_DEVICES", "lo")
        common = {"network.transport": NIXL, "network.trusted": TRUSTED}
    with contextlib.ExitStack() as ends:

        def make(peers: Sequence[Address] = (), folder: Path = tmp_path, **options: Any) -> Member:
            folder.mkdir(exist_ok=True)
            member = Member(folder, peers, **(common | options))
            ends.callback(member.close)
            return member

        yield make


class Liar:
    """A peer that proves itself, and then answers as it is told; takes its time for each word."""

    def __init__(
        self,
        answer: Callable[[Channel, p.Request], None],
        delay_s: float = 0.0,
        ways: Sequence[str] = (),
    ) -> None:
        self._answer = answer
        self._delay_s = delay_s
        self._ways = ways
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._listener.getsockname()[1])
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = self._listener.accept()
                self.connections.append(connected)
                threading.Thread(target=self._serve, args=(connected,), daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        channel, handshake = Channel(connected, 60.0), p.Handshake((SECRET,), self._ways)
        with contextlib.suppress(Exception):
            hello = p.decode_request(channel.receive())
            assert isinstance(hello, p.Hello)
            time.sleep(self._delay_s)
            channel.send(handshake.answer(hello))
            channel.receive()
            time.sleep(self._delay_s)
            channel.send(p.Welcome())
            while body := channel.receive():
                self._answer(channel, p.decode_request(body))

    def close(self) -> None:
        self._listener.close()
        for one in self.connections:
            one.close()


@pytest.fixture
def liar() -> Iterator[Callable[[Callable[[Channel, p.Read], None]], Liar]]:
    """Makes peers that say they have everything, and send it as they are told."""
    liars: list[Liar] = []

    def make(send: Callable[[Channel, p.Read], None]) -> Liar:
        def answer(channel: Channel, request: p.Request) -> None:
            if isinstance(request, p.Stat):
                channel.send(p.Stats([SLOT] * len(request.names)))
            elif isinstance(request, p.Read):
                send(channel, request)
            else:
                channel.send(p.Welcome())

        liars.append(Liar(answer))
        return liars[-1]

    yield make
    for one in liars:
        one.close()


@pytest.mark.parametrize("transport", ["tcp", NIXL])
class TestOneDeployment:
    def test_what_one_has_in_memory_another_loads(
        self, fleet: Callable[..., Member], transport: str
    ) -> None:
        a = fleet()
        b = fleet([a.address]).ready()
        keys = chunk_keys(8)
        a.store(keys)
        assert b.get(keys) == [1] * 8
        assert b.get(keys) == [0] * 8, "and has it from then on"
        a.until(lambda: a.counted(f'peer_sent_bytes_total{{by="{transport}"}}') == 8 * SLOT)
        assert a.counted("peer_sent_bytes_total") == 8 * SLOT
        assert a.get(keys) == [0] * 8

    def test_only_as_far_as_it_goes(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        b = fleet([a.address]).ready()
        keys = chunk_keys(8)
        a.store(keys[:5])
        assert b.get(keys) == [1] * 5
        assert b.get(keys, namespace=bytes(32)) == [0] * 5

    def test_another_order_or_namespace_is_not_there(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        b = fleet([a.address]).ready()
        keys = chunk_keys(3)
        a.store(keys, order=OTHER)
        assert b.get(keys) == []
        a.client.clear()
        a.store(keys)
        assert b.get(keys, namespace=bytes(32)) == []
        assert b.get(keys) == [1] * 3

    def test_each_of_several_peers_gives_what_it_has(self, fleet: Callable[..., Member]) -> None:
        a, b = fleet(), fleet()
        c = fleet([a.address, b.address]).ready()
        keys = chunk_keys(6)
        a.store(keys[:3])
        b.store(keys)
        b.client.clear(keys[:3])
        assert c.get(keys) == [1] * 6
        a.until(lambda: a.counted("peer_sent") == b.counted("peer_sent") == 3 * SLOT)

    def test_a_clear_is_heard_at_once(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        b = fleet([a.address]).ready()
        keys = chunk_keys(4)
        a.store(keys)
        call = b.client.match(keys, [0], [ORDER], [RAW], namespace=NAMESPACE)
        b.client.release(call.wait(5.0).lease)
        a.client.clear()
        b.client.clear()
        assert b.get(keys) == []

    def test_nothing_is_written_to_a_peer(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        b = fleet([a.address]).ready()
        b.store(chunk_keys(3))
        b.client.flush()
        assert a.get(chunk_keys(3)) == []
        assert b.counted("write_behind_skipped_total") == 0

    def test_two_that_are_each_others(self, fleet: Callable[..., Member]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            port = reserved.getsockname()[1]
        a = fleet([Address("127.0.0.1", port)])
        b = fleet([a.address], **{"network.listen": f"127.0.0.1:{port}"}).ready()
        a.store(chunk_keys(3))
        assert b.get(chunk_keys(3)) == [1] * 3
        b.store(chunk_keys(3, 1))
        a.ready()
        assert a.get(chunk_keys(3, 1)) == [1] * 3

    def test_what_is_being_sent_is_held_still(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        (key,) = chunk_keys(1)
        a.store([key])

        def lend() -> None:
            lender, host = a.inprocess.node.lender, a.inprocess.node.host
            slot = lender.lend(Where(0, NAMESPACE, ORDER).name(key, 0))
            assert slot is not None
            view = lender.view(slot)
            before = bytes(view)
            assert host.clear() == 1
            while host.give_back(10):
                pass
            assert host.allocated_bytes == SLOT
            while (other := host.allocate(SLOT)) is not None:
                host.pool.view(other.offset, SLOT)[:] = bytes(SLOT)
                host.discard(other)
                held.append(other)
            assert bytes(view) == before
            lender.give_back(slot)
            for other in held:
                host.unhold(other)
            assert host.allocated_bytes == 0

        held: list[Any] = []
        a.inprocess.run(lend)


class TestWhoMayConnect:
    def test_another_secret_is_refused_on_both_sides(
        self, fleet: Callable[..., Member], tmp_path: Path
    ) -> None:
        a = fleet()
        strange = tmp_path / "strange"
        strange.mkdir()
        (strange / "secret").write_bytes(bytes(32))
        (strange / "secret").chmod(0o600)
        b = fleet([a.address], strange)
        b.until(lambda: "has another secret; copy the deployment's secret_file" in b.state())
        a.store(chunk_keys(2))
        assert b.get(chunk_keys(2)) == []

    def test_who_cannot_prove_it_hears_nothing(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        for last in (p.Proof(bytes(32)), p.Ping(), p.Stat([bytes(60)])):
            channel = Channel(socket.create_connection(a.address), 5.0)
            channel.send(p.Handshake((bytes(32),)).hello())
            assert isinstance(p.decode_reply(channel.receive()), p.Hello)
            channel.send(last)
            assert isinstance(p.decode_reply(channel.receive()), p.Refused)
            assert channel.receive() == b""
            channel.close()
        assert a.counted('peers_refused_total{why="secret"}') == 3

    def test_a_proof_is_good_for_one_connection(self) -> None:
        """What was heard on one connection proves nothing on another."""
        mine, theirs = p.Handshake((SECRET,)), p.Handshake((SECRET,))
        proof = mine.check_server(theirs.answer(mine.hello()), "x")
        assert theirs.check_client(mine.hello(), proof)
        again = p.Handshake((SECRET,))
        again.answer(mine.hello())
        assert not again.check_client(mine.hello(), proof)
        assert not theirs.check_client(p.Handshake((SECRET,)).hello(), proof)

    @pytest.mark.parametrize(
        ("ours", "theirs"), [("A", "BA"), ("BA", "A"), ("BA", "BA"), ("BA", "AB"), ("B", "BA")]
    )
    def test_one_secret_that_both_know_will_do(
        self, fleet: Callable[..., Member], tmp_path: Path, ours: str, theirs: str
    ) -> None:
        a = knowing(fleet, tmp_path, theirs)
        b = knowing(fleet, tmp_path, ours, [a.address]).ready()
        a.store(chunk_keys(2))
        assert b.get(chunk_keys(2)) == [1] * 2

    @pytest.mark.parametrize(
        ("ours", "theirs"), [("A", "B"), ("AC", "B"), ("A", "BC"), ("AB", "C")]
    )
    def test_without_one_both_sides_say_so(
        self, fleet: Callable[..., Member], tmp_path: Path, ours: str, theirs: str
    ) -> None:
        a = knowing(fleet, tmp_path, theirs)
        b = knowing(fleet, tmp_path, ours, [a.address])
        b.until(lambda: "has another secret; copy the deployment's secret_file" in b.state())
        # And the other way round: one that skips the proof of the end that it connects to.
        channel = Channel(socket.create_connection(a.address), 5.0)
        mine = p.Handshake(tuple(SECRETS[name] for name in ours))
        channel.send(mine.hello())
        hello = p.decode_reply(channel.receive())
        assert isinstance(hello, p.Hello)
        for secret in mine._keys:
            assert p._proof(secret, b"server", mine.nonce, hello.nonce) not in hello.proofs
        channel.send(p.Proof(p._proof(mine._keys[0], b"client", mine.nonce, hello.nonce)))
        assert isinstance(p.decode_reply(channel.receive()), p.Refused)
        channel.close()
        a.store(chunk_keys(2))
        assert b.get(chunk_keys(2)) == []

    def test_a_stranger_does_not_learn_how_many_are_known(self) -> None:
        stranger = p.Handshake((bytes(32),))
        for known in ((SECRETS["A"],), (SECRETS["A"], SECRETS["B"])):
            hello = p.Handshake(known).answer(stranger.hello())
            assert [len(proof) for proof in hello.proofs] == [32, 32]
            assert len(set(hello.proofs)) == 2

    def test_no_more_proofs_are_looked_at_than_there_may_be_secrets(self) -> None:
        hello = p.Handshake((SECRET,)).hello([bytes(32)] * 3)
        for decode in (p.decode_request, p.decode_reply):
            with pytest.raises(Incompatible, match="length <= 2"):
                decode(p.encode(hello))

    @pytest.mark.parametrize(
        "hello",
        [
            ["hello", 99, "9.9", bytes(32), 0.0, b"", []],
            ["hello", 99, "9.9", {"of": "another shape"}],
            ["hello", 0, "0.0", bytes(32)],
        ],
    )
    def test_another_version_is_named(self, fleet: Callable[..., Member], hello: list[Any]) -> None:
        """Whatever its hello looks like behind version and release."""
        a = fleet()
        with contextlib.closing(Channel(socket.create_connection(a.address), 5.0)) as channel:
            body = msgspec.msgpack.encode(hello)
            channel._socket.sendall(struct.pack("<I", len(body)) + body)
            reply = p.decode_reply(channel.receive())
            assert isinstance(reply, p.Refused)
            release, version = hello[2], hello[1]
            assert f"(KVStrata {release!r}) speaks peer protocol {version}," in reply.why
            assert channel.receive() == b""
        assert a.counted('peers_refused_total{why="version"}') == 1
        with pytest.raises(Incompatible, match=f"speaks peer protocol {version}, this one"):
            p.Handshake((SECRET,)).check_server(p.decode_reply(body), "x")  # type: ignore[arg-type]

    @pytest.mark.parametrize("seed", range(20))
    def test_garbage_is_hung_up_on(self, fleet: Callable[..., Member], seed: int) -> None:
        a, draw = fleet(), random.Random(seed)
        with socket.create_connection(a.address) as connected:
            connected.settimeout(5.0)
            length = draw.choice([0, 5, 100, 1 << 30])
            with contextlib.suppress(OSError):
                connected.sendall(struct.pack("<I", length) + draw.randbytes(200))
                connected.shutdown(socket.SHUT_WR)
                while connected.recv(4096):
                    pass
        a.store(chunk_keys(1))
        assert a.get(chunk_keys(1)) == [0]

    def test_a_network_needs_tls_or_the_words(self) -> None:
        def load(**options: Any) -> Any:
            return load_config(environ={}, overrides=options)

        with pytest.raises(ConfigError, match=r"network.listen: 10.0.0.1 is no loopback address"):
            load(**{"network.listen": "10.0.0.1:7788"})
        with pytest.raises(ConfigError, match=r"peer.nodes: node-b is no loopback address"):
            load(**{"peer.nodes": "node-b:7788"})
        with pytest.raises(ConfigError, match=r"network.authority: missing; TLS needs"):
            load(**{"network.certificate": "/a.pem", "network.key": "/b.pem"})
        with pytest.raises(ConfigError, match=r"network.transport: nixl goes past TLS"):
            load(**{"network.transport": "nixl"})
        load(**{"network.listen": "10.0.0.1:7788", "network.trusted": TRUSTED})
        load(**{"network.listen": "[::1]:7788", "peer.nodes": "localhost:1, 127.0.0.3:2"})

    def test_tls(self, fleet: Callable[..., Member], tmp_path: Path) -> None:
        files = certificates(tmp_path)
        a = fleet(**files)
        b = fleet([a.address], **files).ready()
        a.store(chunk_keys(5))
        assert b.get(chunk_keys(5)) == [1] * 5
        without = fleet([a.address])
        without.until(lambda: without.state().startswith("off: "))
        assert without.get(chunk_keys(5)) == []

    @pytest.mark.parametrize("tls", [False, True])
    def test_who_ends_hangs_up(
        self, fleet: Callable[..., Member], tmp_path: Path, tls: bool
    ) -> None:
        """Fails where what is hung up on is not the socket that the bytes go by."""
        files = certificates(tmp_path) if tls else {}
        a = fleet(**files)
        b = fleet([a.address], **files).ready()
        a.store(chunk_keys(2))
        assert b.get(chunk_keys(2)) == [1] * 2
        assert a.inprocess.peers is not None
        connections = a.inprocess.peers._connections
        # Neither does one stay that does not say a word.
        with socket.create_connection(a.address):
            a.until(lambda: len(connections) > 1)
            a.close()
            assert not connections

    def test_the_end_waits_until_nothing_is_sent_any_more(
        self, fleet: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is sent lies in host memory, which goes next."""
        forget = PeerServer._forget

        def late(server: PeerServer, connected: socket.socket) -> None:
            time.sleep(0.3)
            forget(server, connected)

        monkeypatch.setattr(PeerServer, "_forget", late)
        a = fleet()
        assert a.inprocess.peers is not None
        connections = a.inprocess.peers._connections
        with socket.create_connection(a.address):
            a.until(lambda: bool(connections))
            a.close()
            assert not connections

    @pytest.mark.parametrize("tls", [False, True])
    def test_who_says_nothing_is_hung_up_on(
        self,
        fleet: Callable[..., Member],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        tls: bool,
    ) -> None:
        """Each holds one of so many connections."""
        monkeypatch.setattr(listening, "HELLO_S", 0.2)
        a = fleet(**(certificates(tmp_path) if tls else {}))
        with socket.create_connection(a.address) as connected:
            connected.settimeout(10.0)
            with contextlib.suppress(ConnectionError):
                assert not connected.recv(4096)


class TestFailures:
    def test_a_peer_that_is_not_there(self, fleet: Callable[..., Member]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            address = Address("127.0.0.1", reserved.getsockname()[1])
        a = fleet()
        b = fleet([address, a.address]).ready()
        a.store(chunk_keys(4))
        assert b.get(chunk_keys(4)) == [1] * 4, "the other one serves on"
        alone = fleet([address])
        alone.until(lambda: alone.state().startswith("off: "))
        assert "Connection refused" in alone.state()

    def test_a_peer_that_dies_and_comes_back(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        b = fleet([a.address]).ready()
        a.store(chunk_keys(3))
        assert b.get(chunk_keys(3)) == [1] * 3
        a.close()
        b.client.clear()
        assert b.get(chunk_keys(3)) == []
        again = fleet(**{"network.listen": str(a.address)})
        again.store(chunk_keys(3))
        b.until(lambda: b.get(chunk_keys(3)) == [1] * 3)

    @pytest.mark.parametrize(
        "how", ["hangs up", "stalls", "sends too much", "says nonsense", "ends with nonsense"]
    )
    def test_a_peer_that_fails_in_the_middle(
        self,
        fleet: Callable[..., Member],
        liar: Callable[..., Liar],
        monkeypatch: pytest.MonkeyPatch,
        how: str,
    ) -> None:
        monkeypatch.setattr(peer_tier, "TIMEOUT_S", 0.5)

        def send(channel: Channel, request: p.Read) -> None:
            if how == "sends too much":
                more = bytes(request.most + 4096)
                channel.send_object(p.Data(len(more)), memoryview(more))
                channel.send_verdict(p.Sent(True))
            elif how == "says nonsense":
                channel.send(p.Stats([1]))
            elif how == "ends with nonsense":
                channel.send_object(p.Data(SLOT), memoryview(bytes(SLOT)))
                channel.send(p.Welcome())
            else:
                channel.send_object(p.Data(SLOT), memoryview(bytes(SLOT // 2)))
                if how == "hangs up":
                    channel.close()

        b = fleet([liar(send).address]).ready()
        assert b.get(chunk_keys(4)) == []
        b.until(lambda: not b.inprocess.run(lambda: b.inprocess.node.movement.filling()))
        assert b.inprocess.run(lambda: b.inprocess.node.host.allocated_bytes) == 0
        b.store(chunk_keys(4))
        assert b.get(chunk_keys(4)) == [0] * 4

    def test_a_peer_that_lies(
        self, fleet: Callable[..., Member], liar: Callable[..., Liar]
    ) -> None:
        """Bytes that are not what was asked for count only as what they are."""
        a = fleet()
        keys = chunk_keys(3)
        a.store(keys)
        host = a.inprocess.node.host

        def stolen(key: bytes) -> bytearray:
            slot = host.get(key, 0)
            assert slot is not None
            return bytearray(host.pool.view(slot.offset, SLOT))

        flipped, exchanged = stolen(keys[0]), stolen(keys[1])
        flipped[5000] ^= 4
        wanted = Where(0, NAMESPACE, ORDER).name(keys[0], 0)

        def send(channel: Channel, request: p.Read) -> None:
            data = flipped if request.name == wanted else exchanged
            channel.send_object(p.Data(SLOT), memoryview(bytes(data)))
            channel.send_verdict(p.Sent(True))

        b = fleet([liar(send).address]).ready()
        assert b.get([keys[0]]) == []
        assert b.get([keys[2]]) == []
        assert b.counted("corrupt_objects_total") == 2
        assert b.get([keys[1]]) == [1], "the one that is what it says it is"

    def test_what_is_cleared_while_it_is_sent_is_a_miss(
        self, fleet: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its slot may have been another object's meanwhile; neither corrupt, nor a failure."""
        a = fleet()
        b = fleet([a.address]).ready()
        a.store(chunk_keys(3))
        send_object = Channel.send_object

        def send(channel: Channel, data: p.Data, payload: memoryview) -> None:
            send_object(channel, data, payload)
            a.client.clear()

        with monkeypatch.context() as patch:
            patch.setattr(Channel, "send_object", send)
            assert b.get(chunk_keys(3)[:1]) == []
        assert b.counted("corrupt_objects_total") == 0
        assert not peers_of(b)[0].failed
        assert a.counted("peer_sent_bytes_total") == 0
        a.store(chunk_keys(3))
        b.until(lambda: b.get(chunk_keys(3)) == [1] * 3)

    def test_a_peer_that_says_nothing_is_left_alone(self, fleet: Callable[..., Member]) -> None:
        """Others are heard in time, and there are threads to ask them, however often."""
        silent = Liar(lambda channel, request: None)
        a = fleet()
        b = fleet([silent.address, a.address], **{"peer.lookup_timeout": "300ms"}).ready()
        b.until(lambda: bool(peers_of(b)[0].failed))
        for prompt in range(20):
            keys = chunk_keys(2, prompt)
            a.store(keys)
            assert b.get(keys) == [1] * 2
        silent.close()

    def test_a_call_has_one_deadline(self) -> None:
        """For connecting, the proof and the answer together."""
        slow = Liar(lambda channel, request: channel.send(p.Welcome()), delay_s=0.8)
        peer = one_peer.Peer(slow.address, by_tcp)
        begun = time.monotonic()
        with pytest.raises(TierUnavailable):
            peer.call(p.Ping(), 1.0)
        assert time.monotonic() - begun < 1.5
        assert peer.failed
        peer.call(p.Ping(), 10.0)
        assert not peer.failed
        peer.close()
        slow.close()

    def test_bytes_that_come_one_by_one_come_too_late(
        self, liar: Callable[..., Liar], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peer_tier, "TIMEOUT_S", 0.5)
        monkeypatch.setattr(peer_tier, "STAT_S", 10.0)

        def send(channel: Channel, request: p.Read) -> None:
            channel.send(p.Data(SLOT))
            for _ in range(100):
                channel._socket.sendall(b"x")
                time.sleep(0.05)

        tier = PeerTier([liar(send).address], by_tcp)
        tier.stat([bytes(60)])
        begun = time.monotonic()
        with pytest.raises(TierUnavailable):
            tier.read([bytes(60)], [memoryview(bytearray(SLOT))])
        assert time.monotonic() - begun < 2.0
        begun = time.monotonic()
        with pytest.raises(TierUnavailable):
            tier.read([bytes(60)], [memoryview(bytearray(SLOT))])
        assert time.monotonic() - begun < 0.2, "it is left alone"
        tier.close()

    def test_a_connection_that_was_idle_for_long_is_made_anew(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = Liar(lambda channel, request: channel.send(p.Welcome()))
        peer = one_peer.Peer(good.address, by_tcp)
        for _ in range(3):
            peer.call(p.Ping(), 5.0)
        assert len(good.connections) == 1
        monkeypatch.setattr(one_peer, "IDLE_S", 0.0)
        peer.call(p.Ping(), 5.0)
        assert len(good.connections) == 2
        peer.close()
        good.close()

    def test_a_node_whose_loop_hangs_says_nothing(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        a.inprocess._loop.call_soon_threadsafe(time.sleep, 1.0)
        peer = one_peer.Peer(a.address, by_tcp)
        with pytest.raises(TierUnavailable):
            peer.call(p.Ping(), 0.5)
        peer.call(p.Ping(), 5.0)
        peer.close()

    def test_after_close_nothing_works(self) -> None:
        tier = PeerTier([Address("127.0.0.1", 1)], lambda address, timeout_s: None)  # type: ignore[arg-type,return-value]
        tier.close()
        tier.close()
        for verb in (lambda: tier.stat([bytes(60)]), tier.epoch,
                     lambda: tier.read([bytes(60)], [memoryview(bytearray(10))])):  # fmt: skip
            with pytest.raises(TierUnavailable):
                verb()

    def test_a_place_is_remembered_for_the_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        a = Liar(lambda channel, request: channel.send(
            p.Stats([0] * len(request.names)) if isinstance(request, p.Stat) else p.Data(0)
        ))  # fmt: skip
        monkeypatch.setattr(peer_tier, "STAT_S", 10.0)
        tier = PeerTier([a.address], by_tcp)
        names = [bytes(60), bytes([1]) * 60]
        assert tier.stat(names) == [Outcome.MISS] * 2
        assert tier.read(names, [memoryview(bytearray(9))] * 2) == [Outcome.MISS] * 2
        assert not isinstance(tier.stat(names)[0], Stat)
        tier.close()
        a.close()


@pytest.mark.parametrize("transport", [NIXL])
class TestLoans:
    """What NIXL adds: an object is lent, read, and given back."""

    def test_it_is_held_until_it_is_given_back(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        keys = chunk_keys(2)
        a.store(keys)
        channel = borrower(a.address)
        for number, key in enumerate(keys):
            name = Where(0, NAMESPACE, ORDER).name(key, 0)
            lent = tcp.ask(channel, p.Borrow(number, name, SLOT), "")
            assert isinstance(lent, p.Lent)
            assert (lent.loan, lent.nbytes) == (number, SLOT)
        a.client.clear()
        assert allocated(a) == 2 * SLOT
        assert tcp.ask(channel, p.Return(0), "") == p.Taken(0)
        a.until(lambda: allocated(a) == SLOT)
        assert a.counted('peer_sent_bytes_total{by="nixl"}') == SLOT
        assert tcp.ask(channel, p.Return(1), "") == p.Taken(1)
        a.until(lambda: allocated(a) == 0)
        channel.close()

    @pytest.mark.parametrize(
        "how", ["hangs up", "says something else", "says nothing", "only borrows on",
                "gives back another", "borrows it twice"])  # fmt: skip
    def test_who_does_not_give_it_back_loses_it(
        self, fleet: Callable[..., Member], monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        a = fleet()
        (key,) = chunk_keys(1)
        a.store([key])
        channel = borrower(a.address)
        monkeypatch.setattr(p, "LOAN_S", 0.3)
        name = Where(0, NAMESPACE, ORDER).name(key, 0)
        tcp.ask(channel, p.Borrow(0, name, SLOT), "")  # one before that, of which all is well
        tcp.ask(channel, p.Return(0), "")
        time.sleep(0.1)
        tcp.ask(channel, p.Borrow(1, name, SLOT), "")
        a.client.clear()
        assert allocated(a) == SLOT
        if how == "hangs up":
            channel.close()
        elif how == "says something else":
            channel.send(p.Ping())
        elif how == "only borrows on":
            with contextlib.suppress(OSError):
                for number in range(2, 1000):
                    tcp.ask(channel, p.Borrow(number, bytes(60), SLOT), "")
                    time.sleep(0.01)
        elif how == "gives back another":
            channel.send(p.Return(2))
        elif how == "borrows it twice":
            channel.send(p.Borrow(1, bytes(60), SLOT))
        a.until(lambda: allocated(a) == 0)
        assert a.counted("peer_sent_bytes_total") == SLOT
        if how != "hangs up":
            with pytest.raises((OSError, TierUnavailable)):
                tcp.ask(channel, p.Return(1), "")
        channel.close()

    def test_nobody_holds_a_whole_pool_still(
        self, fleet: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loans, "MAX_LOANS", 2)
        a = fleet()
        keys = chunk_keys(3)
        a.store(keys)
        channel = borrower(a.address)
        names = [Where(0, NAMESPACE, ORDER).name(key, 0) for key in keys]
        for number, name in enumerate(names[:2]):
            assert isinstance(tcp.ask(channel, p.Borrow(number, name, SLOT), ""), p.Lent)
        with pytest.raises((OSError, TierUnavailable)):
            tcp.ask(channel, p.Borrow(2, names[2], SLOT), "")
        a.client.clear()
        a.until(lambda: allocated(a) == 0)
        channel.close()

    def test_misses_and_what_is_too_large(self, fleet: Callable[..., Member]) -> None:
        a = fleet()
        (key,) = chunk_keys(1)
        a.store([key])
        channel = borrower(a.address)
        name = Where(0, NAMESPACE, ORDER).name(key, 0)
        assert tcp.ask(channel, p.Borrow(1, bytes(60), SLOT), "") == p.Lent(1, 0, 0)
        assert tcp.ask(channel, p.Borrow(1, name, SLOT - 1), "") == p.Lent(1, -1, 0)
        channel.close()

    @pytest.mark.parametrize("ends", [(NIXL, "tcp"), ("tcp", NIXL)])
    def test_over_tcp_where_only_one_end_has_it(
        self, fleet: Callable[..., Member], ends: tuple[str, str]
    ) -> None:
        a = fleet(**{"network.transport": ends[0]})
        b = fleet([a.address], **{"network.transport": ends[1]}).ready()
        a.store(chunk_keys(3))
        assert b.get(chunk_keys(3)) == [1] * 3
        a.until(lambda: a.counted('peer_sent_bytes_total{by="tcp"}') == 3 * SLOT)

    @pytest.mark.parametrize(
        "how", ["other bytes", "no address", "too many", "not taken back", "no agent",
                "another loan", "taken at once", "another taken"])  # fmt: skip
    def test_an_owner_that_lies(self, fleet: Callable[..., Member], how: str) -> None:
        a = fleet()
        keys = chunk_keys(3)
        a.store(keys)
        # What it says of a loan that has been read is too late to harm.
        late = how in ("not taken back", "another taken")
        slot = a.inprocess.node.host.get(keys[0 if late else 1], 0)
        nixl = a.inprocess.node.nixl
        assert slot is not None
        assert nixl is not None
        address = a.inprocess.node.host.pool.address + slot.offset

        def answer(channel: Channel, request: p.Request) -> None:
            reply: p.Reply = p.Welcome()
            match request:
                case p.Stat(names):
                    reply = p.Stats([SLOT] * len(names))
                case p.Introduce():
                    reply = p.Agent(b"none" if how == "no agent" else nixl.lender.metadata)
                case p.Borrow() if how == "another loan":
                    reply = p.Lent(request.loan + 1, SLOT, address)
                case p.Borrow() if how == "taken at once":
                    reply = p.Taken(request.loan)
                case p.Borrow():
                    reply = p.Lent(
                        request.loan,
                        SLOT + 4096 if how == "too many" else SLOT,
                        4096 if how == "no address" else address,
                    )
                case p.Return() if how == "not taken back":
                    reply = p.Refused("it was gone")
                case p.Return() if how == "another taken":
                    reply = p.Taken(request.loan + 1)
                case p.Return():
                    reply = p.Taken(request.loan)
            channel.send(reply)

        liar = Liar(answer, ways=[NIXL])
        b = fleet([liar.address]).ready()
        nixl.lender.begin()
        assert b.get([keys[0]]) == [1] * late
        nixl.lender.end()
        if late:
            (peer,) = peers_of(b)
            line = peer._line
            assert line is not None
            b.until(lambda: not line.lasts(60.0))
            b.client.clear()
        b.until(lambda: not b.inprocess.run(lambda: b.inprocess.node.movement.filling()))
        assert allocated(b) == 0
        assert b.counted("corrupt_objects_total") == (how == "other bytes")
        assert bool(peers_of(b)[0].trouble) == (how != "other bytes" and not late)
        b.store(keys[:1])
        assert b.get(keys[:1]) == [0]
        liar.close()

    def test_an_owner_that_hung_up_meanwhile(self, fleet: Callable[..., Member]) -> None:
        """Nobody was asking, so nothing failed: the next one makes another line."""
        a = fleet()
        b = fleet([a.address]).ready()
        a.store(chunk_keys(6))
        assert b.get(chunk_keys(3)) == [1] * 3
        (peer,) = peers_of(b)
        line = peer._line
        assert line is not None
        line.channel._socket.shutdown(socket.SHUT_RDWR)
        b.until(lambda: not line.lasts(60.0))
        assert b.get(chunk_keys(6)) == [0] * 3 + [1] * 3
        assert peer._line is not line

    def test_beside_tls(self, fleet: Callable[..., Member], tmp_path: Path) -> None:
        files = certificates(tmp_path)
        a = fleet(**files)
        b = fleet([a.address], **files).ready()
        a.store(chunk_keys(5))
        assert b.get(chunk_keys(5)) == [1] * 5
        a.until(lambda: a.counted('peer_sent_bytes_total{by="nixl"}') == 5 * SLOT)

    def test_without_the_library_bytes_come_over_tcp(
        self, fleet: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a = fleet()
        monkeypatch.setattr("kvstrata.transfer.nixl.LIBRARIES", ("no_such_library",))
        b = fleet([a.address]).ready()
        assert "pip install" in b.client.status()["tiers_left_out"]["nixl"]
        a.store(chunk_keys(3))
        assert b.get(chunk_keys(3)) == [1] * 3
        a.until(lambda: a.counted('peer_sent_bytes_total{by="tcp"}') == 3 * SLOT)


def allocated(member: Member) -> int:
    return int(member.inprocess.run(lambda: member.inprocess.node.host.allocated_bytes))


SECRETS = {"A": SECRET, "B": bytes(range(32, 64)), "C": bytes(range(64, 96))}


def knowing(
    fleet: Callable[..., Member], folder: Path, known: str, peers: Sequence[Address] = ()
) -> Member:
    """A node that knows these secrets."""
    folder = folder / f"{known} {len(peers)}"
    folder.mkdir()
    file = folder / "secret"
    file.write_bytes(b"".join(SECRETS[name] for name in known))
    file.chmod(0o600)
    return fleet(peers, folder)


def by_tcp(address: Address, timeout_s: float) -> Channel:
    return tcp.connect(address, (SECRET,), timeout_s)


def borrower(address: Address) -> Channel:
    channel = tcp.connect(address, (SECRET,), 5.0, None, [NIXL])
    tcp.introduce(channel, str(address))
    return channel


def peers_of(member: Member) -> list[one_peer.Peer]:
    tier = member.inprocess.node.backings[-1].tier
    assert isinstance(tier, PeerTier)
    return tier.peers
