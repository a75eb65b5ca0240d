"""Checksums that are made while an object's bytes come, in place of a pass over all of them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from tests.unit.test_objects import portable, sealed, stored

from kvstrata import objects
from kvstrata.brought import Brought, checksum_of
from kvstrata.errors import CorruptObject, Incompatible
from kvstrata.header import ObjectHeader
from kvstrata.objects import HEADER_BYTES, checksum, verify_object
from kvstrata.tiers.base import Outcome, Put
from kvstrata.tiers.faulty import Effect, FaultyTier, FlipBit, ShortRead
from kvstrata.tiers.memory import MemoryTier
from kvstrata.transfer import peers as p
from kvstrata.transfer.tcp import PIECE_BYTES, Channel, fetch


def whole_object(nbytes: int) -> tuple[ObjectHeader, bytearray]:
    """One with a payload of so many bytes."""
    payload = bytes(range(251)) * (nbytes // 251) + bytes(nbytes % 251)
    header = portable(payload, shape=(1, 2, 1, 1, nbytes // 4), dtype="float16")
    return header, stored(header, payload)


def test_a_checksum_that_came_with_the_bytes_is_the_one_that_counts() -> None:
    header, whole = whole_object(8192)
    with pytest.raises(CorruptObject, match="payload checksum"):
        verify_object(whole, header.object_id, bytes(16))
    assert checksum_of(len(whole)) is None, "of a size that is only one it is made"
    whole = stored(header, bytes(whole[HEADER_BYTES:]))
    assert verify_object(whole, header.object_id, header.stored_checksum) == header


class Fetching:
    """Two ends of a connection: what one sends the other fetches."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            self.here, self.there = Channel(one, 10.0), Channel(listener.accept()[0], 10.0)

    def get(self, sent: memoryview, room: memoryview) -> int:
        """What a fetch into this room says."""

        def send() -> None:
            self.there.receive()
            self.there.send_object(p.Data(len(sent)), sent)
            self.there.send_verdict(p.Sent(True))

        sending = threading.Thread(target=send)
        sending.start()
        try:
            return fetch(self.here, b"a name", room, "a peer")
        finally:
            sending.join()


@pytest.fixture
def ends() -> Iterator[Fetching]:
    fetching = Fetching()
    with contextlib.closing(fetching.here), contextlib.closing(fetching.there):
        yield fetching


SIZES = [
    4,
    PIECE_BYTES - HEADER_BYTES - 4,
    PIECE_BYTES - HEADER_BYTES,
    PIECE_BYTES,
    PIECE_BYTES + HEADER_BYTES,
    3 * PIECE_BYTES + 20,
]


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_fetch_over_tcp_makes_it_and_nobody_passes_over_the_bytes_again(
    ends: Fetching, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    header, whole = whole_object(nbytes)
    room = memoryview(bytearray(len(whole)))
    length = ends.get(memoryview(whole), room)
    assert length == len(whole)
    assert room == whole
    passed: list[int] = []

    def noted(some: bytes) -> bytes:
        passed.append(len(some))
        return checksum(some)

    monkeypatch.setattr(objects, "checksum", noted)
    assert verify_object(room, header.object_id, checksum_of(length)) == header
    assert nbytes not in passed


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_flipped_bit_is_seen_wherever_it_is(ends: Fetching, nbytes: int) -> None:
    header, whole = whole_object(nbytes)
    pieces = [end - 1 for end in range(PIECE_BYTES, HEADER_BYTES + nbytes, PIECE_BYTES)]
    for place in {HEADER_BYTES, HEADER_BYTES + nbytes - 1, *pieces}:
        sent = bytearray(whole)
        sent[place] ^= 16
        room = memoryview(bytearray(len(whole)))
        length = ends.get(memoryview(sent), room)
        with pytest.raises(CorruptObject, match="payload checksum"):
            verify_object(room, header.object_id, checksum_of(length))


@pytest.mark.parametrize("length", [0, 1, 5000, PIECE_BYTES, 1 << 63, (1 << 64) - 1])
def test_a_length_that_is_a_lie_is_no_way_around_the_checks(ends: Fetching, length: int) -> None:
    """Even where the header's own checksum fits, for anybody can make that."""
    for nbytes in (8192, PIECE_BYTES + 8192):
        header, whole = whole_object(nbytes)
        struct.pack_into("<Q", whole, 152, length)
        whole[:HEADER_BYTES] = sealed(whole[:HEADER_BYTES])
        room = memoryview(bytearray(len(whole)))
        brought = ends.get(memoryview(whole), room)
        with pytest.raises((CorruptObject, Incompatible)):
            verify_object(room, header.object_id, checksum_of(brought))


@pytest.mark.parametrize("nbytes", [1, 200, HEADER_BYTES - 1, HEADER_BYTES])
def test_what_has_no_payload_is_no_object(ends: Fetching, nbytes: int) -> None:
    header, whole = whole_object(8192)
    room = memoryview(bytearray(nbytes))
    brought = ends.get(memoryview(whole)[:nbytes], room)
    assert brought == nbytes
    assert checksum_of(brought) == checksum(b"")
    with pytest.raises(CorruptObject):
        verify_object(room, header.object_id, checksum_of(brought))


def test_pieces_keep_to_the_deadline(ends: Fetching) -> None:
    """However many there are, each of which is in time."""
    _, whole = whole_object(20 * PIECE_BYTES)
    here, there = ends.here, ends.there
    stop = threading.Event()

    def dribble() -> None:
        there.receive()
        there.send_object(p.Data(len(whole)), memoryview(whole)[:0])
        for start in range(0, len(whole), PIECE_BYTES):
            if stop.wait(0.1):
                return
            there._send([memoryview(whole)[start : start + PIECE_BYTES]])

    sending = threading.Thread(target=dribble)
    sending.start()
    here.begin(0.5)
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        fetch(here, b"a name", memoryview(bytearray(len(whole))), "a peer")
    assert time.monotonic() - begun < 1.5
    stop.set()
    sending.join()


@pytest.mark.parametrize("effect", [FlipBit(8 * 5000), ShortRead()])
def test_what_is_damaged_behind_a_store_has_no_checksum_any_more(effect: Effect) -> None:
    header, whole = whole_object(8192)

    class Making(MemoryTier):
        """Makes checksums on the way, as a peer does."""

        def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
            answers = super().read(ids, into)
            return [
                one if isinstance(one, Outcome) else Brought(one, header.stored_checksum)
                for one in answers
            ]

    tier, page = FaultyTier(Making()), memoryview(whole)
    tier.write([Put(header.object_id, page[:HEADER_BYTES], page[HEADER_BYTES:])])
    room = memoryview(bytearray(len(whole)))
    (length,) = tier.read([header.object_id], [room])
    assert isinstance(length, Brought)
    tier.inject("read", effect)
    (length,) = tier.read([header.object_id], [room])
    assert isinstance(length, int)
    with pytest.raises(CorruptObject, match="payload checksum"):
        verify_object(room, header.object_id, checksum_of(length))
