"""What a fleet knows of models with several layer groups: who could go on where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.groups import FULL, STATE, WINDOW, Needs, group_template, longest_of
from tests.support.nodes import NAMESPACE, ORDER, RAW, chunk_keys, payload
from tests.support.registries import Fleet, Node, fleet_in, until

from kvstrata.fleet import holdings
from kvstrata.fleet.members import Holding, Member
from kvstrata.keys import Namespace
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.testing.servers.redis import installed
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of
from kvstrata.wire.namespaces import Described

KEYS = chunk_keys(6)
ALL_KINDS: Needs = {FULL: 0, WINDOW: 2, STATE: 1}
with_redis = pytest.mark.skipif(not installed(), reason="there is no redis-server here")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_in(tmp_path) as fleet:
        yield fleet


def store(node: Node, part: int, numbers: Sequence[int]) -> None:
    """Have a node store one part of these chunks, and the registry hear of it."""
    for number in numbers:
        call = node.client.reserve(
            NAMESPACE, KEYS[: number + 1], number, part, group_template(part)
        )
        reserved = call.wait(5.0)
        data = payload(KEYS[number], part)
        node.client.pool.view(offsets_of(reserved.offsets)[0] + HEADER_BYTES, RAW)[:] = data
        node.client.commit(reserved.reservation, [checksum(data)]).wait(5.0)
    node.told()


@given(st.data())
def test_the_longest_boundary_is_the_rule_s(data: st.DataObject) -> None:
    needs = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    count = data.draw(st.integers(1, 9))
    cells = st.lists(st.booleans(), min_size=len(needs), max_size=len(needs))
    there = np.array(data.draw(st.lists(cells, min_size=count, max_size=count)))
    has = {(part, number) for number, part in np.argwhere(there).tolist()}
    expected = longest_of(has, dict(enumerate(needs)), count)
    assert holdings._boundary(there, np.array(needs)) == expected


@with_redis
def test_the_registry_tells_where_a_prompt_could_go_on(fleet: Fleet) -> None:
    registry = fleet.registry
    one = Member("x", 1, "r", p.PROTOCOL_VERSION, 1, tiers=[Holding("host"), Holding("disk")])
    registry.renew(one, 60.0, None)
    held = {
        "host": [*((n, FULL) for n in range(5)), (2, WINDOW), (4, STATE)],
        "disk": [(3, WINDOW), (1, STATE), (3, STATE)],
    }
    for tier, objects in held.items():
        ids = [holdings.id_of(KEYS[chunk], part) for chunk, part in objects]
        with registry.call():
            registry.run("SADD", registry.names.held("x", 1, tier), *ids)

    def tiers(needs: Needs) -> list[str]:
        found = holdings.lookup(registry, KEYS, list(needs), needs=list(needs.values()))
        return found[0].tiers if found else []

    assert tiers(ALL_KINDS) == ["host", "host", "host", "disk"]
    assert tiers({FULL: 0, STATE: 1}) == ["host"] * 5
    assert tiers({STATE: 1}) == ["host"] * 5, "nothing but the last one is needed"
    assert tiers({WINDOW: 2}) == ["disk", "disk", "host", "disk"]
    assert tiers({WINDOW: 3}) == []
    (found,) = holdings.holders(registry, [(KEYS[0], STATE), (KEYS[1], STATE)], "disk", [one])
    assert found == one
    assert holdings.holders(registry, [(KEYS[0], STATE)], "disk", [one]) == []


@with_redis
def test_a_member_says_what_a_chunk_is_made_of(fleet: Fleet) -> None:
    node = fleet.join("a")
    parts = Namespace(model="5f3a", layout="x", chunk_tokens=16, tensor_parallel=2)
    objects = [0, 1, WINDOW, WINDOW | 1]
    for told in (
        Described(parts, objects=objects, needs=[0, 0, 2, 2]),
        Described(Namespace(model="5f3b", layout="x", chunk_tokens=16, tensor_parallel=2)),
    ):
        node.client.record(told.record())
    until(lambda: len(fleet.members()["a"].models) == 2)
    known = {one.namespace: one for one in fleet.members()["a"].models}
    model = known.pop(parts.digest().hex())
    assert (list(model.of_chunk), model.needs, model.parts) == (objects, [0, 0, 2, 2], 4)
    (other,) = known.values()  # an engine that has not told
    assert (list(other.of_chunk), other.needs) == ([0, 1], [])


@with_redis
def test_a_peer_that_has_no_chunk_but_the_needed_ones_is_found(fleet: Fleet) -> None:
    peers = {"network.listen": "127.0.0.1:0", "peer.nodes": "fleet", "peer.lookup_timeout": "5s"}
    a, b = fleet.join("a", **peers), fleet.join("b", **peers)
    store(a, STATE, [1, 3])

    def found() -> int:
        call = b.client.match(KEYS, [STATE], [ORDER], [RAW], namespace=NAMESPACE, needs=[1])
        matched: p.Matched = call.wait(10.0)
        b.client.release(matched.lease)
        return len(matched.tiers)

    until(lambda: found() == 4)
