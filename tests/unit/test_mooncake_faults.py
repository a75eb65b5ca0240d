"""The tier in Mooncake Store when its master or who lends it memory hangs or is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.mooncakes import LASTS_S, MIB, tier_of

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.testing.ports import free_port
from kvstrata.testing.servers.mooncake import MooncakeServer, installed
from kvstrata.testing.shared import MARGIN_S, name
from kvstrata.testing.stores import FAILED, HIT, MISS, PAGE, filled, has, read_one, write
from kvstrata.tiers.mooncake import client as clients
from kvstrata.tiers.mooncake import tier as tiers
from kvstrata.tiers.mooncake.client import Client
from kvstrata.tiers.mooncake.settings import Settings, parse_master
from kvstrata.tiers.mooncake.tier import MooncakeTier

pytestmark = pytest.mark.skipif(not installed(), reason="Mooncake's package is not here")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeServer]:
    server = MooncakeServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def test_a_master_that_comes_later(tmp_path: Path) -> None:
    port = free_port()
    tier = MooncakeTier(
        Client(Settings(master=parse_master(f"127.0.0.1:{port}"))), "later", LASTS_S
    )
    begun = time.monotonic()
    with pytest.raises(TierUnavailable, match="start mooncake_master"):
        tier.epoch()
    assert time.monotonic() - begun < clients.REACH_S + MARGIN_S
    server = MooncakeServer(tmp_path, port=port)
    try:
        assert tier.epoch() == tier.epoch()
    finally:
        tier.close()
        server.close()


def test_a_master_that_is_gone_is_said_so_at_once(tmp_path: Path) -> None:
    """But for the first call: the library tries to reach it for seconds each time."""
    server = MooncakeServer(tmp_path)
    tier = tier_of(server)
    try:
        assert has(tier, [name(1)]) == [MISS]
        server.kill()
        with pytest.raises(TierUnavailable, match="does not answer"):
            tier.stat([name(1)])
        for _ in range(3):
            begun = time.monotonic()
            with pytest.raises(TierUnavailable, match="no Mooncake master at"):
                tier.stat([name(1)])
            assert time.monotonic() - begun < clients.REACH_S
        server.restart()
        assert write(tier, [(name(1), filled(PAGE, 1))]) == [HIT]
    finally:
        tier.close()
        server.close()


def test_no_room_at_all(tmp_path: Path) -> None:
    """A tier takes no writes then, and what it holds can still be read."""
    server = MooncakeServer(tmp_path)
    tier, data = tier_of(server), filled(8 * MIB, 1)
    try:
        write(tier, [(name(1), filled(PAGE, 1))])
        server.fill()
        begun = time.monotonic()
        with pytest.raises(TierFull, match="no room"):
            write(tier, [(name(2), data), (name(3), data)])
        assert time.monotonic() - begun < tiers.ROOM_S + MARGIN_S
        server.make_room()
        assert write(tier, [(name(2), data)]) == [HIT]
    finally:
        tier.close()
        server.close()


def test_what_readers_hold_is_removed_in_the_end(tmp_path: Path) -> None:
    """With the lease that a master has unless told otherwise, a removal is waited for."""
    server = MooncakeServer(tmp_path, options=["-default_kv_lease_ttl=10s"])
    tier = tier_of(server)
    try:
        write(tier, [(name(1), filled(PAGE, 1))])
        assert has(tier, [name(1)]) == [HIT]
        begun = time.monotonic()
        assert tier.delete([name(1), name(2)]) == [HIT, MISS]
        assert tiers.GENTLE_S < time.monotonic() - begun < tiers.GENTLE_S + MARGIN_S
        assert has(tier, [name(1)]) == [MISS]
    finally:
        tier.close()
        server.close()


def test_lenders_that_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: MooncakeServer
) -> None:
    """Reads and writes fail in time; what the library gave up on ends with its client."""
    monkeypatch.setattr(tiers, "ABANDONED_S", 1.0)
    tier, data = tier_of(server, "hanging"), filled(4 * MIB, 1)
    assert write(tier, [(name(i), data) for i in range(8)]) == [HIT] * 8
    assert [read_one(tier, name(i), 4 * MIB)[0] for i in range(8)] == [HIT] * 8
    with tier._client.use() as first:
        pass
    server.pause_lenders()
    try:
        begun = time.monotonic()
        assert read_one(tier, name(1), 4 * MIB)[0] is FAILED
        assert time.monotonic() - begun < tier.limits.timeout_s
        assert first.closed.is_set()
    finally:
        server.resume_lenders()
    assert read_one(tier, name(1), 4 * MIB) == (HIT, bytes(data))
    tier.close()


def test_a_lender_that_hung_before_it_was_known(tmp_path: Path) -> None:
    """With a metadata server nobody waits for its first words."""
    server = MooncakeServer(tmp_path, metadata=True)
    first, second = (tier_of(server, metadata=server.metadata) for _ in range(2))
    try:
        write(first, [(name(1), filled(PAGE, 1))])
        assert has(second, [name(1)]) == [HIT]
        server.pause_lenders()
        begun = time.monotonic()
        assert read_one(second, name(1), PAGE)[0] is FAILED
        assert time.monotonic() - begun < second.limits.timeout_s
        server.resume_lenders()
        assert read_one(second, name(1), PAGE)[0] is HIT
    finally:
        first.close()
        second.close()
        server.close()


def test_a_close_does_not_pull_the_rug_out(
    server: MooncakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call into a closed client would end the process; it is closed by the last to leave."""
    monkeypatch.setattr(clients, "LEAVE_S", 0.5)
    tier, data = tier_of(server, "rug"), filled(4 * MIB, 1)
    write(tier, [(name(1), data)])
    assert read_one(tier, name(1), 4 * MIB)[0] is HIT
    with tier._client.use() as current:
        pass
    server.pause_lenders()
    try:
        with ThreadPoolExecutor(1) as threads:
            reading = threads.submit(read_one, tier, name(1), 4 * MIB)
            time.sleep(0.5)
            begun = time.monotonic()
            tier.close()
            assert time.monotonic() - begun < clients.LEAVE_S + MARGIN_S
            assert not reading.done()
            with pytest.raises(TierUnavailable, match="closed"):
                tier.stat([name(1)])
            assert not current.closed.is_set()
            assert reading.result()[0] is FAILED
            assert current.closed.is_set()
    finally:
        server.resume_lenders()


def test_a_lender_that_is_killed(tmp_path: Path) -> None:
    """Its objects are misses, others go on, and the epoch outlives it."""
    server = MooncakeServer(tmp_path, num_lenders=2, options=["-client_ttl=2"])
    tier = tier_of(server)
    try:
        epoch, names = tier.epoch(), [name(i) for i in range(20)]
        write(tier, [(one, filled(PAGE, 1)) for one in names])
        with tier._client.use() as current:
            (copies,) = current.store.batch_get_replica_desc([tier._epoch_key]).values()
        assert len(copies) == 2
        server.lenders[0].kill()
        begun = time.monotonic()
        found = [read_one(tier, one, PAGE)[0] for one in names]
        assert time.monotonic() - begun < tier.limits.timeout_s + MARGIN_S
        assert HIT in found
        assert set(found) > {HIT}
        deadline = time.monotonic() + 20
        while MISS not in has(tier, names):
            assert time.monotonic() < deadline, "the master never noticed"
            time.sleep(0.2)
        assert tier.epoch() == epoch
        assert write(tier, [(name(99), filled(PAGE, 2))]) == [HIT]
    finally:
        tier.close()
        server.close()
