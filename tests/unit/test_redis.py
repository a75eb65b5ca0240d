"""The tier in Redis keeps the contract, against real servers: one, one of pieces, a cluster."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from kvstrata.errors import TierUnavailable
from kvstrata.testing.ground import Server
from kvstrata.testing.servers.redis import RedisCluster, RedisServer, installed
from kvstrata.testing.shared import SharedTierContract, name
from kvstrata.testing.stores import (
    FAILED,
    HIT,
    MISS,
    PAGE,
    empty,
    filled,
    has,
    put,
    read_one,
    write,
)
from kvstrata.tiers.base import Outcome, SharedTier, Stat
from kvstrata.tiers.redis import tier as module
from kvstrata.tiers.redis.address import parse_address
from kvstrata.tiers.redis.connections import Time
from kvstrata.tiers.redis.heads import HEAD_BYTES, Head, decode_head
from kvstrata.tiers.redis.tier import RedisTier

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

SOON_S = 4.0
"""Within which calls end here, so that tests of hanging servers do."""


class TestOneServer(SharedTierContract):
    def start_server(self, folder: Path) -> Server:
        return RedisServer(folder)

    def make_tier(self, server: Server, place: str) -> SharedTier:
        assert isinstance(server, RedisServer)
        return RedisTier(parse_address(server.url), place, timeout_s=SOON_S)


class TestInPieces(SharedTierContract):
    """Objects of more than two pages are several values."""

    def start_server(self, folder: Path) -> Server:
        return RedisServer(folder)

    def make_tier(self, server: Server, place: str) -> SharedTier:
        assert isinstance(server, RedisServer)
        address = parse_address(server.url)
        return RedisTier(address, place, timeout_s=SOON_S, ttl_s=600, piece_bytes=2 * PAGE)


class TestCluster(SharedTierContract):
    def start_server(self, folder: Path) -> Server:
        return RedisCluster(folder)

    def make_tier(self, server: Server, place: str) -> SharedTier:
        assert isinstance(server, RedisCluster)
        return RedisTier(parse_address(server.url), place, timeout_s=SOON_S, piece_bytes=9 * PAGE)


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
    """Of pieces of three pages."""
    tier = RedisTier(parse_address(server.url), "kv", timeout_s=SOON_S, piece_bytes=3 * PAGE)
    yield tier
    tier.close()


def key_of(number: int) -> bytes:
    return b"kv:" + name(number).hex().encode()


def head_of(admin: redis.Redis, number: int) -> Head:
    head = decode_head(admin.getrange(key_of(number), 0, HEAD_BYTES - 1))
    assert head is not None
    return head


class TestPieces:
    @pytest.mark.parametrize(
        ("pages", "later"), [(1, 0), (2, 0), (3, 0), (4, 1), (6, 1), (7, 2), (30, 9)]
    )
    def test_an_object_is_as_many_values_as_it_takes(
        self, tier: RedisTier, admin: redis.Redis, pages: int, later: int
    ) -> None:
        data = filled(pages * PAGE, pages)
        assert write(tier, [(name(1), data)]) == [HIT]
        head = head_of(admin, 1)
        assert (head.nbytes, head.piece_bytes) == (pages * PAGE, 3 * PAGE)
        pieces = [b"%s:%s:%d" % (key_of(1), head.version.encode(), 1 + i) for i in range(later)]
        assert sorted(admin.keys()) == sorted([key_of(1), *pieces])
        stored = admin.get(key_of(1))[HEAD_BYTES:] + b"".join(admin.get(one) for one in pieces)
        assert stored == data
        assert tier.stat([name(1)]) == [Stat(pages * PAGE, "", head.version)]
        assert read_one(tier, name(1), pages * PAGE) == (HIT, bytes(data))
        assert tier.read([name(1)], [empty(pages * PAGE)[: pages * PAGE - 1]]) == [FAILED]
        assert tier.delete([name(1)]) == [HIT]
        assert admin.keys() == []

    def test_another_release_may_cut_otherwise(self, server: RedisServer, tier: RedisTier) -> None:
        data = filled(20 * PAGE, 1)
        write(tier, [(name(1), data)])
        other = RedisTier(parse_address(server.url), "kv", piece_bytes=7 * PAGE)
        assert read_one(other, name(1), 20 * PAGE) == (HIT, bytes(data))
        assert other.delete([name(1)]) == [HIT]
        other.close()

    def test_what_is_replaced_leaves_nothing(self, tier: RedisTier, admin: redis.Redis) -> None:
        for pages, count in ((10, 4), (10, 4), (4, 2), (1, 1), (7, 3)):
            write(tier, [(name(1), filled(pages * PAGE, pages))])
            assert admin.dbsize() == count

    def test_who_comes_second_leaves_nothing(
        self, tier: RedisTier, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        late = [put(name(1), filled(10 * PAGE, 2), True)]
        write(tier, [(name(1), filled(PAGE, 1))])
        admin.config_resetstat()
        assert tier.write(late) == [MISS]
        assert "cmdstat_set" not in admin.info("commandstats"), "nothing is sent for nothing"
        lines, looks = tier._lines, iter([[b""]])
        monkeypatch.setattr(tier, "_lines", lambda keys: next(looks, None) or lines(keys))
        assert tier.write(late) == [MISS], "it came between the look and the write"
        assert admin.keys() == [key_of(1)]
        assert read_one(tier, name(1), 10 * PAGE) == (HIT, bytes(filled(PAGE, 1)))

    def test_a_write_whose_answer_was_lost_is_still_ours(
        self, tier: RedisTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """redis-py asks again; what stands there then is our own."""
        data = filled(10 * PAGE, 1)
        head = Head("0123456789abcdef", 10 * PAGE, 3 * PAGE)
        monkeypatch.setattr(module, "new_head", lambda *sizes: head)
        run = tier._client.run

        def run_twice(*command: Any, **options: Any) -> Any:
            run(*command, **options)
            return run(*command, **options)

        monkeypatch.setattr(tier._client, "run", run_twice)
        assert tier.write([put(name(1), data, True)]) == [HIT]
        monkeypatch.setattr(tier._client, "run", run)
        assert read_one(tier, name(1), 10 * PAGE) == (HIT, bytes(data))

    def test_old_pieces_are_never_read_with_new_ones(
        self, tier: RedisTier, admin: redis.Redis
    ) -> None:
        """Not even where a value comes back that was replaced, with its name."""
        write(tier, [(name(1), filled(10 * PAGE, 1))])
        old = admin.get(key_of(1))
        write(tier, [(name(1), filled(10 * PAGE, 2))])
        admin.set(key_of(1), old)
        assert read_one(tier, name(1), 10 * PAGE)[0] is MISS

    def test_a_reader_that_meets_a_replacement_reads_the_new_one(
        self, tier: RedisTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was there all the time; only one that is replaced each time it is read is a miss."""
        versions = [filled(12 * PAGE, number) for number in range(module.ATTEMPTS + 1)]
        coming = list[Any]()
        fetch_all = tier._fetch_all

        def replaced_first(*wanted: Any) -> bool:
            if coming:
                write(tier, [(name(1), coming.pop(0))])
            return fetch_all(*wanted)

        monkeypatch.setattr(tier, "_fetch_all", replaced_first)
        for times in range(module.ATTEMPTS + 1):
            write(tier, [(name(1), versions[0])])
            coming[:] = versions[1 : 1 + times]
            whole = (HIT, bytes(versions[times])) if times < module.ATTEMPTS else (MISS, b"")
            assert read_one(tier, name(1), 12 * PAGE) == whole

    def test_whole_objects_while_others_replace_them(self, tier: RedisTier) -> None:
        """Never parts of two; how often a reader loses the race is the machine's."""
        versions = [filled(12 * PAGE, number) for number in range(4)]
        wanted, stop = {bytes(data) for data in versions}, threading.Event()
        write(tier, [(name(1), versions[0])])

        def replace(seed: int) -> None:
            draw = random.Random(seed)
            while not stop.is_set():
                write(tier, [(name(1), draw.choice(versions))])

        def read(_: int) -> list[Outcome]:
            seen = []
            for _ in range(150):
                outcome, data = read_one(tier, name(1), 12 * PAGE)
                assert outcome is not HIT or data in wanted
                seen.append(outcome)
            return seen

        with ThreadPoolExecutor(4) as threads:
            writers = [threads.submit(replace, 0)]
            readers = list(threads.map(read, range(2)))
            stop.set()
            assert [one.result() for one in writers] == [None]
        assert HIT in readers[0] + readers[1]

    def test_an_object_that_lost_a_piece_is_removed(
        self, tier: RedisTier, admin: redis.Redis
    ) -> None:
        """Redis evicts values one by one; what is left must not stand in a fresh copy's way."""
        data = filled(10 * PAGE, 1)
        for number in (1, 2, 3):
            write(tier, [(name(1), data)])
            admin.delete(b"%s:%s:%d" % (key_of(1), head_of(admin, 1).version.encode(), number))
            assert has(tier, [name(1)]) == [HIT], "so much for a look"
            assert read_one(tier, name(1), 10 * PAGE)[0] is MISS
            assert admin.keys() == []
        assert tier.write([put(name(1), data, True)]) == [HIT]

    def test_a_piece_of_another_length_is_none(self, tier: RedisTier, admin: redis.Redis) -> None:
        for change in (PAGE, -1):
            write(tier, [(name(1), filled(10 * PAGE, 1))])
            piece = b"%s:%s:1" % (key_of(1), head_of(admin, 1).version.encode())
            admin.set(piece, bytes(3 * PAGE + change))
            assert read_one(tier, name(1), 10 * PAGE)[0] is MISS
            assert admin.keys() == []

    def test_a_past_epoch_goes_with_its_pieces(self, tier: RedisTier, admin: redis.Redis) -> None:
        names = [name(i, epoch) for epoch in (1, 2) for i in range(40)]
        write(tier, [(one, filled(7 * PAGE, 1)) for one in names])
        admin.set("kvother:" + name(1, 1).hex(), "of somebody else")
        assert tier.forget(1) == 40
        assert admin.dbsize() == 3 * 40 + 1
        assert has(tier, names) == [MISS] * 40 + [HIT] * 40

    def test_a_large_past_is_removed_bit_by_bit(
        self, tier: RedisTier, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As much as there is time for; the rest by upkeep."""
        write(tier, [(name(number), filled(PAGE, 1)) for number in range(200)])
        monkeypatch.setattr(module, "FORGET_BATCH", 30)
        monkeypatch.setattr(Time, "left_s", 0.0)
        assert tier.forget(1) == 30
        for left in (140, 110, 80, 50, 20, 0, 0):
            tier.upkeep()
            assert admin.dbsize() == left


class TestWhatIsNotOurs:
    @pytest.mark.parametrize(
        "value",
        [
            b"x",
            bytes(PAGE),
            b"kvstrata-object 1 ",
            Head("0" * 16, 2 * PAGE, 3 * PAGE).encode() + bytes(PAGE),
            Head("0" * 16, PAGE, 3 * PAGE).encode() + bytes(2 * PAGE),
            Head("0" * 16, PAGE, 3 * PAGE).encode(),
            Head("0" * 16, 0, 3 * PAGE).encode(),
            Head("0" * 16, PAGE, 0).encode() + bytes(PAGE),
            Head("0" * 16, PAGE, 3 * PAGE).encode()[:-1] + b" " + bytes(PAGE),
            Head("Z" * 16, PAGE, 3 * PAGE).encode() + bytes(PAGE),
        ],
    )
    def test_a_broken_value_is_removed(
        self, tier: RedisTier, admin: redis.Redis, value: bytes
    ) -> None:
        admin.set(key_of(1), value)
        assert read_one(tier, name(1), 10 * PAGE)[0] is MISS
        assert admin.keys() == []

    def test_one_that_claims_more_than_there_is_room_for(
        self, tier: RedisTier, admin: redis.Redis
    ) -> None:
        for head in (Head("0" * 16, 1 << 63, 1 << 62), Head("0" * 16, 1 << 63, 1)):
            admin.set(key_of(1), head.encode() + bytes(PAGE))
            assert read_one(tier, name(1), 10 * PAGE)[0] in (FAILED, MISS)
            assert tier.delete([name(1)])[0] in (HIT, MISS)

    def test_one_of_a_later_release_stays(self, tier: RedisTier, admin: redis.Redis) -> None:
        value = b"kvstrata-object 2 of which nothing is known here" + bytes(PAGE)
        admin.set(key_of(1), value)
        assert has(tier, [name(1)]) == [FAILED]
        assert read_one(tier, name(1), 10 * PAGE)[0] is FAILED
        assert tier.write([put(name(1), filled(PAGE, 1), True)]) == [MISS]
        assert admin.get(key_of(1)) == value

    def test_a_key_of_another_type_fails_alone(self, tier: RedisTier, admin: redis.Redis) -> None:
        admin.rpush(key_of(1), "x")
        write(tier, [(name(2), filled(PAGE, 2))])
        names = [name(1), name(2)]
        assert has(tier, names) == [FAILED, HIT]
        assert tier.read(names, [empty(PAGE), empty(PAGE)]) == [FAILED, PAGE]
        tier.touch(names)
        assert tier.delete(names) == [FAILED, HIT]
        assert admin.type(key_of(1)) == b"list"

    def test_an_epoch_of_another_release_says_what_to_do(
        self, tier: RedisTier, admin: redis.Redis
    ) -> None:
        admin.set("kv:epoch", "kvstrata-epoch 2 whatever")
        for verb in (tier.epoch, tier.begin_epoch):
            with pytest.raises(TierUnavailable, match=r"the key kv:epoch of redis holds .* remove"):
                verb()
        assert admin.get("kv:epoch") == b"kvstrata-epoch 2 whatever"


def test_an_epoch_that_was_evicted_is_followed_by_a_new_one(
    tier: RedisTier, admin: redis.Redis
) -> None:
    before = tier.epoch()
    assert admin.ttl("kv:epoch") == -1
    admin.delete("kv:epoch")
    after = tier.epoch()
    assert after.number != before.number
    assert tier.begin_epoch().number != after.number
    assert admin.ttl("kv:epoch") == -1


def test_an_epoch_that_another_began_meanwhile_is_everybodys(
    tier: RedisTier, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tier.epoch()
    run, looks = tier._client.run, [None]

    def run_late(*command: Any) -> Any:
        return looks.pop() if looks and command[0] == "GET" else run(*command)

    monkeypatch.setattr(tier._client, "run", run_late)
    assert tier.epoch() == theirs


class TestTimeToLive:
    TTL_MS = 600_000

    @pytest.fixture
    def tier(self, server: RedisServer, admin: redis.Redis) -> Iterator[RedisTier]:
        tier = RedisTier(
            parse_address(server.url), "kv", ttl_s=self.TTL_MS / 1000, piece_bytes=3 * PAGE
        )
        write(tier, [(name(1), filled(10 * PAGE, 1)), (name(2), filled(PAGE, 2))])
        yield tier
        tier.close()

    def left(self, admin: redis.Redis) -> list[bool]:
        """Whether each value has most of its time before it."""
        return [0.9 * self.TTL_MS < admin.pttl(key) <= self.TTL_MS for key in sorted(admin.keys())]

    def expire_soon(self, admin: redis.Redis) -> None:
        for key in list(admin.scan_iter()):
            admin.pexpire(key, 10_000)

    def test_begins_with_a_write(self, tier: RedisTier, admin: redis.Redis) -> None:
        assert self.left(admin) == [True] * 5
        assert tier.write([put(name(3), filled(PAGE, 1), True)]) == [HIT]
        assert self.left(admin) == [True] * 6

    def test_begins_again_with_a_read(self, tier: RedisTier, admin: redis.Redis) -> None:
        self.expire_soon(admin)
        assert read_one(tier, name(1), 10 * PAGE) == (HIT, bytes(filled(10 * PAGE, 1)))
        assert self.left(admin) == [True] * 4 + [False]

    def test_begins_again_when_it_is_used(self, tier: RedisTier, admin: redis.Redis) -> None:
        self.expire_soon(admin)
        tier.touch([name(2), name(3)])
        assert self.left(admin) == [False] * 4 + [True]
        tier.touch([name(1), name(2)])
        assert self.left(admin) == [True] * 5

    def test_ends(self, server: RedisServer, tier: RedisTier, admin: redis.Redis) -> None:
        shortly = RedisTier(parse_address(server.url), "kv", ttl_s=0.001)
        epoch = shortly.epoch()
        write(shortly, [(name(5), filled(PAGE, 1))])
        for _ in range(100):
            if has(shortly, [name(5)]) == [MISS]:
                break
        assert read_one(shortly, name(5), PAGE)[0] is MISS
        assert shortly.epoch() == epoch
        shortly.close()


def test_what_is_used_is_evicted_last(tier: RedisTier, admin: redis.Redis) -> None:
    """With all its pieces: Redis' own clock of their use goes on."""
    write(tier, [(name(1), filled(10 * PAGE, 1))])
    keys = admin.keys()
    while min(admin.object("idletime", key) for key in keys) < 1:
        time.sleep(0.05)
    tier.touch([name(1)])
    assert [admin.object("idletime", key) for key in keys] == [0] * 4
