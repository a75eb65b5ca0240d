"""What a connection between two nodes puts on the wire."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.certificates import certificates

from kvstrata.transfer import peers as p
from kvstrata.transfer.tcp import WITHIN_BYTES, Channel

PAYLOAD = memoryview(bytes(range(256)) * 16)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    channels = Channel(one, 10.0), Channel(other, 10.0)
    yield channels
    for channel in channels:
        channel.close()


def test_an_object_comes_whole_whatever_was_said_before(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    for count in (1, 0, 7):
        for number in range(count):
            here.send(p.Stats([number] * number))
            assert p.decode_reply(there.receive()) == p.Stats([number] * number)
        here.send_object(p.Data(len(PAYLOAD)), PAYLOAD)
        here.send_verdict(p.Sent(count > 0))
        data = p.decode_reply(there.receive())
        assert isinstance(data, p.Data)
        assert data.nbytes == len(PAYLOAD)
        came = bytearray(len(PAYLOAD))
        there.receive_object(memoryview(came))
        assert came == PAYLOAD
        sent = p.decode_reply(there.receive())
        assert isinstance(sent, p.Sent)
        assert sent.stayed == (count > 0)


@pytest.mark.parametrize("near", [True, False])
def test_only_within_a_machine_little_is_kept_of_what_is_sent(*, near: bool) -> None:
    """Elsewhere more is under way, and the kernel knows how much."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = ("127.0.0.1" if near else "127.0.0.2", 0)
        one = socket.create_connection(listener.getsockname(), source_address=source)
        other, _ = listener.accept()
    before = other.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    with one, other:
        Channel(other, 10.0)
        after = other.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert (after == 2 * WITHIN_BYTES) == near
    assert (after == before) == (not near)


@pytest.mark.parametrize("nbytes", [4096, 1 << 20, 1 << 40])
@pytest.mark.parametrize("stayed", [True, False])
def test_what_is_sent_beside_an_object_takes_whole_lines(nbytes: int, *, stayed: bool) -> None:
    """Else the kernel copies the next ones at a third of the speed, which no answer shows."""
    one, other = socket.socketpair()
    here = Channel(one, 10.0)
    with other:
        here.send_object(p.Data(nbytes), PAYLOAD[:0])
        before = len(other.recv(1 << 12))
        here.send_verdict(p.Sent(stayed))
        behind = len(other.recv(1 << 12))
    here.close()
    assert (before, behind) == (p.LINE_BYTES, p.LINE_BYTES)


def test_an_object_that_comes_in_pieces_is_whole(ends: tuple[Channel, Channel]) -> None:
    """Wherever they end: in a frame, in its bytes, in the verdict."""
    here, there = ends
    here.send_object(p.Data(len(PAYLOAD)), PAYLOAD)
    here.send_verdict(p.Sent(True))
    here.send(p.Stats([3]))
    bytes_sent = there._socket.recv(1 << 16)
    for step in (1, 63, 64, 200, 4095, 4160, len(bytes_sent)):
        pieces = [bytes_sent[i : i + step] for i in range(0, len(bytes_sent), step)]
        player = threading.Thread(target=_play, args=(here, pieces))
        player.start()
        assert isinstance(p.decode_reply(there.receive()), p.Data)
        came = bytearray(len(PAYLOAD))
        there.receive_object(memoryview(came))
        assert came == PAYLOAD
        sent = p.decode_reply(there.receive())
        assert isinstance(sent, p.Sent)
        assert p.decode_reply(there.receive()) == p.Stats([3])
        player.join()


def _play(out: Channel, pieces: list[bytes]) -> None:
    for piece in pieces:
        out._socket.sendall(piece)


def test_who_sends_a_byte_now_and_then_is_not_waited_for(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    stop = threading.Event()

    def dribble() -> None:
        here.send_object(p.Data(1 << 20), PAYLOAD)
        while not stop.wait(0.02):
            here.send_object(p.Data(1), PAYLOAD[:1])

    dribbling = threading.Thread(target=dribble)
    dribbling.start()
    there.begin(0.3)
    assert isinstance(p.decode_reply(there.receive()), p.Data)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nothing within 0\.3 s"):
        there.receive_object(memoryview(bytearray(1 << 20)))
    assert time.monotonic() - begun < 2.0
    stop.set()
    dribbling.join()


def test_who_takes_a_byte_now_and_then_is_not_waited_for(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    here.begin(0.3)
    stop = threading.Event()

    def sip() -> None:
        while not stop.wait(0.02):
            there._socket.recv(4096)

    sipping = threading.Thread(target=sip)
    sipping.start()
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nothing within 0\.3 s"):
        here.send_object(p.Data(1 << 26), memoryview(bytes(1 << 26)))
    assert time.monotonic() - begun < 2.0
    stop.set()
    sipping.join()


def test_one_that_hangs_up_in_the_middle_is_no_object(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    here.send_object(p.Data(2 * len(PAYLOAD)), PAYLOAD)
    here.close()
    assert isinstance(p.decode_reply(there.receive()), p.Data)
    with pytest.raises(ConnectionError, match="in the middle"):
        there.receive_object(memoryview(bytearray(2 * len(PAYLOAD))))
    assert there.receive() == b""


def test_a_call_in_the_last_microsecond_ends(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the kernel no time at all is for ever."""
    here, there = ends
    clock = iter([0.0, 1.0 - 5e-7])
    its_time = SimpleNamespace(monotonic=lambda: next(clock, 2.0))
    monkeypatch.setattr("kvstrata.transfer.tcp.time", its_time)
    there.begin(1.0)
    end = threading.Timer(5.0, here.close)
    end.start()
    try:
        with pytest.raises(TimeoutError):
            there.receive()
    finally:
        end.cancel()


@pytest.mark.parametrize("timeout_s", [0.5, 5.0, 3600.0])
def test_the_kernel_is_asked_again_before_the_deadline(
    ends: tuple[Channel, Channel], timeout_s: float
) -> None:
    """Its timers are late by an eighth, and who ends late has all peers left alone for one."""
    here, there = ends
    for part in (1.0, 0.99, 0.9, 0.1, 1.0):
        here.send(p.Stats([]))
        there.begin(part * timeout_s)
        there.receive()
        taken = there._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
        seconds, microseconds = struct.unpack("@ll", taken)
        asked = (seconds + microseconds / 1e6) / (part * timeout_s)
        assert 0.3 < asked < 8 / 9


def test_an_object_goes_by_tls_uncopied(tmp_path: Path) -> None:
    """A copy would be made while nothing else of the node runs."""
    certificates(tmp_path)
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(tmp_path / "node.pem", tmp_path / "node.key")
    asking = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    payload, came = memoryview(bytes(1 << 20)), bytearray(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    heard: list[p.Reply] = []

    def take() -> None:
        there = Channel(asking.wrap_socket(other, server_hostname="127.0.0.1"), 10.0)
        heard.append(p.decode_reply(there.receive()))
        there.receive_object(memoryview(came))
        heard.append(p.decode_reply(there.receive()))
        there.close()

    taking = threading.Thread(target=take)
    taking.start()
    here = Channel(serving.wrap_socket(one, server_side=True), 10.0)
    tracemalloc.start()
    try:
        here.send_object(p.Data(len(payload)), payload)
        here.send_verdict(p.Sent(True))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        taking.join()
        here.close()
    assert [type(one) for one in heard] == [p.Data, p.Sent]
    assert came == payload
    assert most < len(payload)


def test_two_threads_are_never_in_one_tls_connection_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hears while the other speaks; together they were seen to end the process."""
    files = certificates(tmp_path)
    ours = ssl.create_default_context(cafile=files["network.authority"])
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(files["network.certificate"], files["network.key"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()

    def answer() -> None:
        there = Channel(theirs.wrap_socket(other, server_side=True), 10.0)
        while there.receive():
            there.send(p.Welcome())
        there.close()

    answering = threading.Thread(target=answer)
    answering.start()
    here = Channel(ours.wrap_socket(one, server_hostname="127.0.0.1"), 10.0).on_loop()
    inside, together, wanted = [0], [0], 20

    def watched(name: str) -> None:
        method = getattr(ssl.SSLSocket, name)

        def call(self: ssl.SSLSocket, *args: Any) -> Any:
            if self is not here._socket:
                return method(self, *args)
            inside[0] += 1
            together[0] += inside[0] > 1
            time.sleep(0.001)
            try:
                return method(self, *args)
            finally:
                inside[0] -= 1

        monkeypatch.setattr(ssl.SSLSocket, name, call)

    watched("recv")
    watched("send")

    def speak() -> None:
        for _ in range(wanted):
            here.send(p.Ping())

    speaking = threading.Thread(target=speak)
    speaking.start()
    heard, until = 0, time.monotonic() + 10.0
    while heard < wanted and time.monotonic() < until:
        heard += sum(bool(body) for body in here.receive())
    speaking.join()
    monkeypatch.undo()
    here.close()
    answering.join()
    assert (heard, together) == (wanted, [0])


def test_nothing_follows_a_frame_that_went_out_in_part() -> None:
    """Who hears it would take the words of another for its rest."""
    one, other = socket.socketpair()
    channel = Channel(one, 10.0).on_loop()
    with contextlib.closing(channel), other:
        with pytest.raises(ConnectionError, match="takes nothing"):
            channel.send(*[p.Stats([0] * 1000)] * 500)
        other.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while other.recv(1 << 20):
                pass
        with pytest.raises(ConnectionError, match="takes nothing"):
            channel.send(p.Ping())
