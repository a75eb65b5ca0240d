"""A Redis Cluster that moves, dies and hangs under a tier."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis.crc import key_slot
from tests.support.redis_tiers import every_verb, rule_on_the_page, tier_at, timed, until

from kvstrata.errors import TierUnavailable
from kvstrata.testing.servers.redis import RedisCluster, RedisServer, installed
from kvstrata.testing.shared import MARGIN_S, name
from kvstrata.testing.stores import HIT, MISS, PAGE, empty, filled, has, put, read_one, write

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

MIB = 1 << 20
SECRET = "hunter2"
SOON_S = 1.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


class TestMoves:
    def test_objects_lie_on_all_of_a_cluster(self, cluster: RedisCluster) -> None:
        tier = tier_at(cluster.url, piece_bytes=2 * PAGE)
        write(tier, [(name(number), filled(20 * PAGE, number)) for number in range(10)])
        for server in cluster.servers:
            with server.admin() as admin:
                assert admin.dbsize() > 20
        assert tier.forget(1) == 10
        tier.close()

    def test_one_host_is_enough_to_find_the_others(self, cluster: RedisCluster) -> None:
        one = cluster.servers[1].port
        tier = tier_at(f"redis+cluster://127.0.0.1:1,127.0.0.1:{one}")
        every_verb(tier)
        tier.close()

    def test_a_server_that_is_no_cluster(
        self, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        server = RedisServer(tmp_path / "redis")
        request.addfinalizer(server.close)
        tier = tier_at(server.url.replace("redis", "redis+cluster"))
        with pytest.raises(TierUnavailable, match="Cluster mode is not enabled"):
            tier.epoch()
        tier.close()

    def test_a_cluster_that_is_taken_for_one_server(self, cluster: RedisCluster) -> None:
        tier = tier_at(cluster.servers[0].url)
        with pytest.raises(TierUnavailable, match=r"one server of a cluster.*redis\+cluster://"):
            tier.read([name(number) for number in range(20)], [empty(PAGE)] * 20)
        tier.close()

    def test_slots_move_under_our_feet(self, cluster: RedisCluster) -> None:
        """To another server, first half-way (ASK), then for good (MOVED)."""
        tier, data = tier_at(cluster.url), filled(2 * MIB, 1)
        number = 7
        key = b"kvstrata:" + name(number).hex().encode()
        write(tier, [(name(number), data)])
        slot = key_slot(key)
        admins = [one.admin() for one in cluster.servers]
        ids = [admin.execute_command("CLUSTER MYID").decode() for admin in admins]
        owner = next(i for i, admin in enumerate(admins) if admin.keys(key))
        target = (owner + 1) % 3

        def move(verb: str, at: int, other: int) -> None:
            admins[at].execute_command(f"CLUSTER SETSLOT {slot} {verb} {ids[other]}")

        move("IMPORTING", target, owner)
        move("MIGRATING", owner, target)
        assert read_one(tier, name(number), 2 * MIB) == (HIT, bytes(data)), "it is still there"
        to = ("127.0.0.1", cluster.servers[target].port)
        admins[owner].migrate(*to, [key], 0, 5000)
        assert read_one(tier, name(number), 2 * MIB) == (HIT, bytes(data)), "ASK"
        assert has(tier, [name(number)]) == [HIT]
        for at in range(3):
            move("NODE", at, target)
        assert read_one(tier, name(number), 2 * MIB) == (HIT, bytes(data)), "MOVED"
        stale = tier_at(cluster.url)
        stale.epoch()
        admins[target].delete(key)
        for at in (target, owner, 3 - target - owner):
            move("NODE", at, owner)  # and back, empty
        assert stale.write([put(name(number), data, True)]) == [HIT], "a write that is sent twice"
        assert read_one(stale, name(number), 2 * MIB) == (HIT, bytes(data))
        admins[owner].delete(key)
        for at in (owner, target, 3 - target - owner):
            move("NODE", at, target)
        assert write(stale, [(name(number), data)]) == [HIT], "one that replaces, too"
        assert stale.delete([name(number)]) == [HIT]
        for admin in admins:
            admin.close()
        for one in (tier, stale):
            one.close()

    def test_the_rule_on_the_page_is_enough_in_a_cluster(self, cluster: RedisCluster) -> None:
        for server in cluster.servers:
            with server.admin() as admin:
                admin.execute_command(*rule_on_the_page(SECRET))
        tier = tier_at(cluster.url.replace("://", f"://kvstrata:{SECRET}@"), piece_bytes=3 * PAGE)
        every_verb(tier)
        tier.close()

    def test_many_calls_into_a_cluster_that_hangs(self, cluster: RedisCluster) -> None:
        """redis-py looks for the cluster's servers in one thread at a time."""
        tier = tier_at(cluster.url, timeout_s=SOON_S)
        write(tier, [(name(number), filled(PAGE, 1)) for number in range(16)])
        cluster.pause()
        try:
            with ThreadPoolExecutor(16) as threads:
                reads = [
                    lambda number=number: tier.read([name(number)], [empty(PAGE)])
                    for number in range(16)
                ]
                took = list(threads.map(timed, reads))
        finally:
            cluster.resume()
        assert max(took) < SOON_S + MARGIN_S
        until(lambda: has(tier, [name(0)]) == [HIT])
        assert read_one(tier, name(0), PAGE)[0] is HIT
        tier.close()


def test_a_primary_dies_and_its_replica_takes_over(tmp_path: Path) -> None:
    """The tier goes on by itself."""
    cluster = RedisCluster(tmp_path / "cluster")
    first = cluster.servers[0]
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]
    replica = RedisServer(tmp_path / "replica", options)
    tier = tier_at(cluster.url, timeout_s=2.0)
    try:
        with first.admin() as admin:
            primary = admin.execute_command("CLUSTER MYID").decode()
        with replica.admin() as admin:
            admin.execute_command("CLUSTER MEET", "127.0.0.1", first.port)
            until(lambda: primary in str(admin.execute_command("CLUSTER NODES")))
            until(lambda: admin.execute_command(f"CLUSTER REPLICATE {primary}"))
            names = [name(number) for number in range(30)]
            write(tier, [(one, filled(PAGE, 1)) for one in names])
            until(lambda: admin.info("replication")["master_link_status"] == "up")
            with first.admin() as other:
                until(lambda: admin.dbsize() == other.dbsize() > 0)
        first.kill()
        until(lambda: has(tier, names) == [HIT] * 30)
        assert tier.write([put(one, filled(PAGE, 1), True) for one in names]) == [MISS] * 30
        assert write(tier, [(one, filled(PAGE, 2)) for one in names]) == [HIT] * 30
    finally:
        tier.close()
        replica.close()
        cluster.close()
