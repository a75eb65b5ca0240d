"""Which clock dates go by: the fleet's registry's, whatever the machine's own says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.nodes import GatedTier, chunk_keys, flush, load, on_node, owned
from tests.support.registries import Fleet, fleet_in, until
from tests.unit.test_owners import ANNA, answer, client, keep, there

from kvstrata.fleet import commands
from kvstrata.node.common.wall import WallClock
from kvstrata.node.node import Node
from kvstrata.testing.servers.redis import installed
from kvstrata.tiers.marks import MARGIN_NS
from kvstrata.wire import protocol as p
from kvstrata.wire.operator import Operator

MINUTE_NS = 60 * 10**9


def test_a_time_that_was_heard_goes_on_whatever_is_set() -> None:
    now = {"wall": 5_000, "monotonic": 70}
    wall = WallClock(lambda: now["wall"], lambda: now["monotonic"])
    assert wall() == 5_000
    now["wall"] = 4_000
    assert wall() == 4_000, "the machine's own, as long as there is no other"
    now["monotonic"] = 2 * 10**9
    wall.heard(1.0, 1.5)
    assert wall() == 1_500_000_000
    now["wall"] = 0
    now["monotonic"] += 7
    assert wall() == 1_500_000_007
    wall.heard(3.0, 2.0)
    assert wall() == 3_000_000_007


def test_objects_clears_and_ages_are_all_dated_by_it() -> None:
    async def test(node: Node) -> None:
        early = time.time() - 1000
        node.wall.heard(early, time.monotonic())
        keys = chunk_keys(2)
        keep(node, keys, ANNA)
        await flush(node, client())
        state = (await answer(node, p.Status(1))).state
        (_, slot), *_ = node.host.index.objects(keys[0])
        for dated in (node.host.created_ns(slot) / 1e9, state["now"]):
            assert early <= dated < early + 500
        assert owned(node).wall is node.wall
        await answer(node, p.Clear(1, None, [], ANNA))
        (mark,) = owned(node).marks
        assert early <= mark.before_ns / 1e9 < early + 500
        keep(node, keys, ANNA)  # dated behind that
        await flush(node, client())
        # By the machine's own clock they would be younger than this.
        await answer(node, p.Clear(2, None, [], b"", b"", mark.before_ns + MARGIN_NS // 2))
        assert there(node, keys) == []
        assert await load(node, client(), keys) == 0

    on_node(test, tier=GatedTier())


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_in(tmp_path) as fleet:
        yield fleet


@pytest.mark.skipif(not installed(), reason="there is no redis-server here")
def test_what_a_node_whose_clock_is_ahead_stores_no_clear_misses(fleet: Fleet) -> None:
    a, b = fleet.join("a"), fleet.join("b")
    ahead = a.inprocess.node.wall
    ahead._wall_ns = lambda: time.time_ns() + 10 * MINUTE_NS
    keys = chunk_keys(3)
    for node in (a, b):
        node.store(keys)
    created = [
        Operator(node.client).inspect("host", keys[0]).header["created_ns"] for node in (a, b)
    ]
    assert abs(created[0] - created[1]) < MINUTE_NS
    before_ns = fleet.registry.now_ns()
    assert commands.give(fleet.registry, p.Clear(0, None, [], b"", b"", before_ns), 20.0).done
    assert [node.has(keys) for node in (a, b)] == [0, 0]
    until(lambda: a.good and b.good)
