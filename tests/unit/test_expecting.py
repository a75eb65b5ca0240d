"""What a peer is about to have: leased at once, filled as it comes, given up when it does not."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.members import Member
from tests.support.nodes import NAMESPACE, ORDER, RAW, SLOT, chunk_keys, payload, template

from kvstrata.node import lending
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

KEYS = chunk_keys(6)
MAY_NAME: dict[str, Any] = {"peer.named": "loopback"}
PEER = 1


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., tuple[Member, Member]]]:
    """A node that computes, and one that a request sends to it."""
    with contextlib.ExitStack() as ends:

        def make(**options: Any) -> tuple[Member, Member]:
            a = Member(tmp_path, **options)
            ends.callback(a.close)
            b = Member(tmp_path, **MAY_NAME)
            ends.callback(b.close)
            return a, b.ready()

        yield make


def came(b: Member, matched: p.Matched, have: int) -> tuple[list[bytes], bool]:
    """Payloads of the next chunks, once there are any, and whether no more will come."""
    arrived = b.client.await_arrival(matched.lease, have).wait(10.0)
    places = offsets_of(arrived.offsets)
    found = [bytes(b.client.pool.view(at + HEADER_BYTES, RAW)) for at in places]
    return found, arrived.failed


def held(member: Member) -> int:
    """Bytes that a node keeps for others."""
    return int(member.inprocess.run(lambda: member.inprocess.node.lender.kept_bytes))


class TestProgress:
    def test_chunks_come_as_the_peer_stores_them(
        self, pair: Callable[..., tuple[Member, Member]]
    ) -> None:
        a, b = pair()
        a.store(KEYS[:1])
        matched = b.match(KEYS, peer=str(a.address), expected_s=5.0)
        assert list(matched.tiers) == [PEER] * 6, "all of it is promised"
        got: list[bytes] = []
        for number in range(1, 7):
            while len(got) < number:
                some, failed = came(b, matched, len(got))
                assert not failed
                got += some
            assert len(got) == number, "no more than the peer has"
            if number < 6:
                a.store(KEYS[: number + 1])
        assert got == [payload(key) for key in KEYS]
        b.client.release(matched.lease)
        assert b.get(KEYS) == [0] * 6
        assert b.counted("followed_chunks_total") == 5

    def test_what_is_not_said_to_come_is_not_waited_for(
        self, pair: Callable[..., tuple[Member, Member]]
    ) -> None:
        a, b = pair()
        a.store(KEYS[:2])
        assert b.get(KEYS, peer=str(a.address)) == [PEER] * 2

    def test_what_does_not_come_is_given_up(
        self, pair: Callable[..., tuple[Member, Member]]
    ) -> None:
        a, b = pair()
        a.store(KEYS[:2])
        begun = time.monotonic()
        assert b.get(KEYS, peer=str(a.address), expected_s=0.3) == [PEER] * 2
        assert 0.3 <= time.monotonic() - begun < 3.0
        b.until(lambda: b.inprocess.run(lambda: not list(b.inprocess.node.movement.under_way())))
        assert b.inprocess.run(lambda: b.inprocess.node.host.allocated_bytes) == 2 * SLOT

    def test_a_peer_that_dies_ends_it_at_once(
        self, pair: Callable[..., tuple[Member, Member]]
    ) -> None:
        a, b = pair()
        a.store(KEYS[:2])
        matched = b.match(KEYS, peer=str(a.address), expected_s=600.0)
        assert len(came(b, matched, 0)[0]) >= 1
        a.close()
        have = 1
        while not (answer := came(b, matched, have))[1]:
            have += len(answer[0])
        b.client.release(matched.lease)

    def test_a_reader_that_leaves_ends_it(self, pair: Callable[..., tuple[Member, Member]]) -> None:
        a, b = pair()
        for _ in range(3):
            matched = b.match(KEYS, peer=str(a.address), expected_s=600.0)
            assert len(matched.tiers) == 6
            b.client.release(matched.lease)
        b.until(lambda: b.inprocess.run(lambda: b.inprocess.node.host.allocated_bytes) == 0)
        a.store(KEYS)
        assert b.get(KEYS, peer=str(a.address), expected_s=1.0) == [PEER] * 6

    def test_two_that_wait_for_the_same(self, pair: Callable[..., tuple[Member, Member]]) -> None:
        a, b = pair()
        got: list[list[int]] = []

        def get() -> None:
            got.append(b.get(KEYS, peer=str(a.address), expected_s=5.0))

        first = b.match(KEYS, peer=str(a.address), expected_s=5.0)
        others = [threading.Thread(target=get) for _ in range(2)]
        for other in others:
            other.start()
        time.sleep(0.1)
        b.client.release(first.lease)
        a.store(KEYS)
        for other in others:
            other.join(10)
        assert got == [[PEER] * 6] * 2

    def test_a_clear_ends_it(self, pair: Callable[..., tuple[Member, Member]]) -> None:
        a, b = pair()
        matched = b.match(KEYS, peer=str(a.address), expected_s=600.0)
        b.client.clear()
        assert came(b, matched, 0) == ([], True)
        b.client.release(matched.lease)

    def test_without_lengths_nothing_is_expected(
        self, pair: Callable[..., tuple[Member, Member]]
    ) -> None:
        a, b = pair()
        call = b.client.match(
            KEYS, [0], [ORDER], namespace=NAMESPACE, peer=str(a.address), expected_s=5.0
        )
        assert call.wait(5.0).tiers == b""

    def test_one_node_for_both(self, tmp_path: Path) -> None:
        """Two engines of one machine: the one's node is the other's."""
        with contextlib.closing(Member(tmp_path, **MAY_NAME)) as a:
            a.ready()
            matched = a.match(KEYS, peer=str(a.address), expected_s=5.0)
            assert len(matched.tiers) == 6
            a.store(KEYS)
            got: list[bytes] = []
            while len(got) < 6:
                some, failed = came(a, matched, len(got))
                assert not failed
                got += some
            assert got == [payload(key) for key in KEYS]
            a.client.release(matched.lease)


class TestKeeping:
    def lend(self, a: Member, keys: Sequence[bytes]) -> None:
        call = a.client.reserve(NAMESPACE, keys, 0, 0, template(ORDER), lend=True)
        reserved = call.wait(5.0)
        sums = []
        for key, offset in zip(keys, offsets_of(reserved.offsets), strict=True):
            if offset >= 0:
                a.client.pool.view(offset + HEADER_BYTES, RAW)[:] = payload(key)
            sums.append(checksum(payload(key)))
        a.client.commit(reserved.reservation, sums).wait(5.0)

    def test_it_outlives_eviction_until_the_other_node_has_it(
        self, pair: Callable[..., tuple[Member, Member]]
    ) -> None:
        a, b = pair()
        self.lend(a, KEYS)
        assert held(a) == 6 * SLOT
        for number in range(1, 60):
            a.store(chunk_keys(4, number))
        assert a.inprocess.run(lambda: a.inprocess.node.host.num_evicted) > 0
        assert b.get(KEYS, peer=str(a.address)) == [PEER] * 6
        a.until(lambda: held(a) == 0)
        for number in range(60, 120):
            a.store(chunk_keys(4, number))
        assert a.get(KEYS) == [], "and is like all the rest from then on"

    def test_what_was_there_already_is_kept_too(
        self, pair: Callable[..., tuple[Member, Member]]
    ) -> None:
        a, _ = pair()
        a.store(KEYS[:3])
        assert held(a) == 0
        self.lend(a, KEYS)
        assert held(a) == 6 * SLOT
        self.lend(a, KEYS)
        assert held(a) == 6 * SLOT, "once"

    def test_nobody_came_for_it(
        self, pair: Callable[..., tuple[Member, Member]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lending, "KEEP_S", 0.2)
        monkeypatch.setattr(lending, "SWEEP_S", 0.05)
        a, _ = pair()
        self.lend(a, KEYS)
        a.until(lambda: held(a) == 0)
        assert a.counted("kept_in_vain_total") == 6
        assert a.get(KEYS) == [0] * 6, "it is still there"

    def test_a_clear_takes_it_too(
        self, pair: Callable[..., tuple[Member, Member]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lending, "SWEEP_S", 0.05)
        a, b = pair()
        self.lend(a, KEYS)
        a.client.clear()
        assert b.get(KEYS, peer=str(a.address)) == []
        a.until(lambda: a.inprocess.run(lambda: a.inprocess.node.host.allocated_bytes) == 0)
        assert held(a) == 0

    def test_no_more_is_kept_than_a_process_may_hold(
        self, pair: Callable[..., tuple[Member, Member]]
    ) -> None:
        a, _ = pair(**{"leases.per_client": "10%"})
        for number in range(20):
            self.lend(a, chunk_keys(1, number))
        assert 0 < held(a) <= (1 << 20) // 10
        assert a.counted("unkept_objects_total") > 0
