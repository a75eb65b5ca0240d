"""The tier in Redis, against real servers: one, a cluster, with TLS and access lists, and full."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("redis")

from kvstrata.testing.servers.redis import RedisCluster, RedisServer, installed
from kvstrata.testing.shared import Server, SharedTierContract
from kvstrata.tiers.base import SharedTier
from kvstrata.tiers.redis.address import parse_address
from kvstrata.tiers.redis.tier import RedisTier

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

SOON_S = 1.5
"""Within which calls end here, so that tests of hanging servers do."""


class TestOneServer(SharedTierContract):
    def start_server(self, folder: Path) -> Server:
        return RedisServer(folder)

    def make_tier(self, server: Server, place: str) -> SharedTier:
        assert isinstance(server, RedisServer)
        return RedisTier(parse_address(server.url), place, timeout_s=SOON_S)


class TestCluster(SharedTierContract):
    def start_server(self, folder: Path) -> Server:
        return RedisCluster(folder)

    def make_tier(self, server: Server, place: str) -> SharedTier:
        assert isinstance(server, RedisCluster)
        return RedisTier(parse_address(server.url), place, timeout_s=SOON_S)
