"""The tier in Mooncake Store, against a real master and processes that lend it memory, over TCP."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support.mooncakes import LASTS_S, MIB, Borrowed, WithClients, client_of, tier_of

from kvstrata.errors import DeadlineExceeded, TierUnavailable
from kvstrata.testing.ground import Server
from kvstrata.testing.servers.mooncake import SEGMENT_BYTES, MooncakeServer, installed
from kvstrata.testing.shared import SharedTierContract, name
from kvstrata.testing.stores import (
    FAILED,
    HIT,
    MISS,
    PAGE,
    StoreContract,
    empty,
    filled,
    has,
    put,
    read_one,
    write,
)
from kvstrata.tiers.base import Epoch, SharedTier, Store
from kvstrata.tiers.mooncake import client as clients
from kvstrata.tiers.mooncake import reading
from kvstrata.tiers.mooncake.client import Client
from kvstrata.tiers.mooncake.settings import Settings, parse_master
from kvstrata.tiers.mooncake.tier import MooncakeTier

pytestmark = pytest.mark.skipif(not installed(), reason="Mooncake's package is not here")


class TestMooncake(SharedTierContract):
    """Two clients, which take turns to be a tier's."""

    clients: Iterator[Client]

    def start_server(self, folder: Path) -> Server:
        return WithClients(folder)

    def make_tier(self, server: Server, place: str) -> SharedTier:
        return MooncakeTier(Borrowed(next(self.clients)), place, LASTS_S)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _clients(cls, _server: None) -> Iterator[None]:
        assert isinstance(cls.server, WithClients)
        cls.server.clients = client_of(cls.server), client_of(cls.server)
        cls.clients = itertools.cycle(cls.server.clients)
        yield
        for client in cls.server.clients:
            client.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeServer]:
    """Two lenders, as a fleet has."""
    server = MooncakeServer(tmp_path_factory.mktemp("server"), num_lenders=2)
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: MooncakeServer) -> Iterator[Client]:
    client = client_of(server)
    yield client
    client.close()


@pytest.fixture
def tier(client: Client, request: pytest.FixtureRequest) -> MooncakeTier:
    """In a place of its own, on a client that others have as well."""
    return MooncakeTier(client, request.node.name.replace("[", "-").replace("]", ""), LASTS_S)


# memory that has to be registered, as with RDMA; TCP bears it


class TestRegistered(StoreContract):
    """What lies in the bound pool goes without a copy, all else through registered buffers."""

    client: Client
    places: Iterator[int]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _registering(cls, server: MooncakeServer) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clients, "NEED_NO_REGISTRATION", frozenset())
            cls.places = itertools.count()
            cls.client = client_of(server, buffer_bytes=16 * MIB)
            yield
            cls.client.close()

    def make_store(self, folder: Path) -> Store:
        return MooncakeTier(Borrowed(self.client), f"registered-{next(self.places)}", LASTS_S)

    def test_the_pool_is_registered_and_nothing_else(self) -> None:
        pool = filled(8 * PAGE, 1)
        self.client.bind(pool)
        with self.client.use() as current:
            deadline = time.monotonic() + 10
            while True:
                with current.memory.lend([pool[PAGE : 2 * PAGE], empty(PAGE)]) as (inside, outside):
                    if inside.direct:
                        break
                assert time.monotonic() < deadline, "the pool was never registered"
            assert not outside.direct
            with current.memory.lend([pool[7 * PAGE :]]) as (inside,):
                assert inside.direct

    def test_more_than_there_are_buffers_for(self, store: Store) -> None:
        data = filled(20 * MIB, 1)
        assert write(store, [(name(1), data)]) == [FAILED]
        assert has(store, [name(1)]) == [MISS]
        with (
            self.client.use() as current,
            pytest.raises(DeadlineExceeded, match="no registered buffer"),
            current.memory.lend([data]),
        ):
            pass
        assert write(store, [(name(1), data[: 4 * MIB])]) == [HIT]
        assert read_one(store, name(1), 20 * MIB)[0] is FAILED
        assert read_one(store, name(1), 4 * MIB) == (HIT, bytes(data[: 4 * MIB]))


def test_over_tcp_nothing_is_registered(tier: MooncakeTier, client: Client) -> None:
    """What is registered others could write to."""
    tier.bind(filled(PAGE, 1))
    with client.use() as current, current.memory.lend([filled(PAGE, 1)]) as (loan,):
        assert loan.direct
        assert current.memory.registered_bytes == 0


# epochs


def test_clears_at_once_all_end_with_a_new_epoch(server: MooncakeServer, client: Client) -> None:
    other = client_of(server)
    pair = [MooncakeTier(one, "clears", LASTS_S) for one in (client, other, client)]
    start = threading.Barrier(3)

    def clear(tier: MooncakeTier) -> Epoch:
        start.wait()
        return tier.begin_epoch()

    with ThreadPoolExecutor(3) as threads:
        for _ in range(15):
            before = pair[0].epoch()
            begun = set(threads.map(clear, pair))
            assert before not in begun
            assert pair[0].epoch() in begun
    other.close()


def test_what_is_no_epoch(tier: MooncakeTier, client: Client) -> None:
    for content in (b"kvstrata-epoch 2 of another release\n", bytes(9000)):
        with client.use() as current:
            current.store.remove(tier._epoch_key, True)
            assert current.store.put(tier._epoch_key, content) == 0
        with pytest.raises(TierUnavailable, match="remove that object"):
            tier.epoch()


def test_an_epoch_is_never_evicted(tier: MooncakeTier) -> None:
    epoch, data = tier.epoch(), filled(4 * MIB, 1)
    for i in range(3 * SEGMENT_BYTES // (4 * MIB) * 2):
        try:
            assert tier.write([put(name(i), data)]) == [HIT]
        except TierUnavailable:
            time.sleep(0.1)
    assert MISS in has(tier, [name(i) for i in range(10)]), "nothing was evicted"
    assert tier.epoch() == epoch


def test_a_dot_is_a_dot(client: Client) -> None:
    mine, theirs = (MooncakeTier(client, prefix, LASTS_S) for prefix in ("a.b", "axb"))
    for one in (mine, theirs):
        write(one, [(name(1), filled(PAGE, 1))])
    assert mine.forget(1) == 1
    assert has(theirs, [name(1)]) == [HIT]


# objects


def test_an_object_that_is_being_written_is_not_there(tier: MooncakeTier, client: Client) -> None:
    """Nor does it come to be there when its writer dies before the end."""
    key, data = tier._key(name(1)), filled(PAGE, 1)
    with client.use() as current:
        started = current.store.batch_put_session_start([key], [PAGE])
        assert started == [0]
    assert has(tier, [name(1)]) == [MISS]
    assert read_one(tier, name(1), PAGE)[0] is MISS
    assert tier.delete([name(1)]) == [MISS]
    with client.use() as current:
        current.store.batch_put_session_revoke([key])
    assert tier.write([put(name(1), data, True)]) == [HIT]


def test_a_write_of_ours_that_never_ended_stands_in_nobodys_way(
    tier: MooncakeTier, client: Client
) -> None:
    with client.use() as current:
        current.store.batch_put_session_start([tier._key(name(1))], [PAGE])
    assert write(tier, [(name(1), filled(2 * PAGE, 1))]) == [HIT]
    assert read_one(tier, name(1), 2 * PAGE) == (HIT, bytes(filled(2 * PAGE, 1)))


def test_threads_of_one_client_take_turns_at_an_object(
    tier: MooncakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library has one session of a key: what a second thread begins ends the first one's."""
    data, names = filled(5 * PAGE, 1), [name(1), name(2)]
    write(tier, [(one, data) for one in names])
    read_once, reading_now, most = reading._read, list[str](), dict[str, int]()

    def counted(client: Client, store: Any, keys: list[str], loans: Any) -> list[int]:
        reading_now.extend(keys)
        most["of one"] = max(most.get("of one", 0), reading_now.count(keys[0]))
        most["of all"] = max(most.get("of all", 0), len(reading_now))
        time.sleep(0.005)
        try:
            return read_once(client, store, keys, loans)
        finally:
            reading_now.remove(keys[0])

    monkeypatch.setattr(reading, "_read", counted)
    with ThreadPoolExecutor(6) as threads:
        work = [(one, size * PAGE) for size in (5, 8) for one in names] * 15
        answers = list(threads.map(lambda one: read_one(tier, *one), work))
    assert answers == [(HIT, bytes(data))] * 60
    assert most == {"of one": 1, "of all": 2}


@pytest.mark.parametrize(("before", "after"), [(3, 7), (7, 3), (3, 9), (3, 10), (7, 0)])
def test_an_object_that_is_replaced_while_it_is_read(
    tier: MooncakeTier, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """A reader gets all of one of them; here after the library looked up where the first lies."""
    write(tier, [(name(1), filled(before * PAGE, 1))])
    sizes_of = reading.sizes_of
    replaced: list[list[int]] = []

    def sizes_of_what_is_there_then(store: Any, keys: Sequence[str]) -> dict[str, int]:
        if not replaced:
            replaced.append(store.batch_remove(keys, True))
            if after:
                assert write(tier, [(name(1), filled(after * PAGE, 2))]) == [HIT]
        return sizes_of(store, keys)

    monkeypatch.setattr(reading, "sizes_of", sizes_of_what_is_there_then)
    found = read_one(tier, name(1), 9 * PAGE)
    assert replaced == [[0]]
    if after > 9:
        assert found == (FAILED, b"")
    else:
        assert found == ((HIT, bytes(filled(after * PAGE, 2))) if after else (MISS, b""))


def test_copies_of_objects(server: MooncakeServer) -> None:
    tier = tier_of(server, "copies", replicas=2, soft_pin=True)
    write(tier, [(name(1), filled(PAGE, 1))])
    with tier._client.use() as current:
        (copies,) = current.store.batch_get_replica_desc([tier._key(name(1))]).values()
    assert len(copies) == 2
    tier.close()


def test_one_client_after_another(server: MooncakeServer) -> None:
    """A closed one leaves no thread behind."""
    counts = []
    for i in range(3):
        tier = tier_of(server, "one-after-another")
        assert has(tier, [name(1)]) == [HIT if i else MISS]
        write(tier, [(name(1), filled(PAGE, 1))])
        tier.close()
        counts.append(len(os.listdir("/proc/self/task")))
    assert counts[2] <= counts[0]


QUIET = """
import sys
from pathlib import Path
from typing import Any
from kvstrata.testing.shared import name
from kvstrata.testing.stores import empty, filled, write
from kvstrata.tiers.mooncake.client import Client
from kvstrata.tiers.mooncake.settings import Settings, parse_master
from kvstrata.tiers.mooncake.tier import MooncakeTier
tier = MooncakeTier(Client(Settings(master=parse_master(sys.argv[1]))), "quiet", 5.0)
tier.epoch(), tier.begin_epoch(), tier.forget(1)
print(tier.stat([name(1)]), tier.read([name(1)], [empty(4096)]), tier.delete([name(1)]))
write(tier, [(name(1), filled(4096, 1))] * 2)
print(tier.stat([name(1)]), tier.read([name(1)], [empty(4096)]), tier.delete([name(1)]))
tier.close()
"""


def test_nothing_is_logged_while_nothing_is_wrong(server: MooncakeServer) -> None:
    """But for two lines of the library when it begins, which it cannot be talked out of."""
    done = subprocess.run(
        [sys.executable, "-c", QUIET, server.address], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    first, second = done.stderr.splitlines()
    assert first.startswith("WARNING: Logging before InitGoogleLogging()")
    assert second.endswith("Local segment descriptor not found")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    with pytest.raises(TierUnavailable, match=r"pip install 'kvstrata\[mooncake\]'"):
        Client(Settings(master=parse_master("127.0.0.1:1")))
