"""A node's events: in order, numbered, none lost; and its sets, which say what it holds."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.nodes import chunk_keys
from tests.support.registries import SHORT_S, Fleet, fleet_in, until

from kvstrata.errors import Incompatible, TierUnavailable
from kvstrata.fleet import events, holdings
from kvstrata.node.common.changes import Cause, Changes
from kvstrata.node.common.index import Index
from kvstrata.node.common.journal import Journal
from kvstrata.node.fleet import telling
from kvstrata.node.fleet.telling import Telling
from kvstrata.observe.counters import Counters
from kvstrata.policies import create_policy
from kvstrata.testing.servers.redis import installed

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

KEYS = chunk_keys(4)
TIERS = ("host", "disk")
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_in(tmp_path_factory.mktemp("fleet"), SHORT_S) as fleet:
        yield fleet


class Teller:
    """Two indexes that tell a journal, and what sends it on."""

    def __init__(self, fleet: Fleet, most: int) -> None:
        self.name = f"n{next(NUMBERS)}"
        self.registry = fleet.registry
        changes, self.journal = Changes(), Journal(most)
        changes.watch(self.journal)
        self.indexes: dict[str, Index[int]] = {}
        for tier in TIERS:
            index = Index[int](1000, create_policy("lru", 1000, lambda: 0.0), lambda size: size)
            index.tell(tier, changes)
            self.indexes[tier] = index

        async def at_once(call: Callable[[], Any]) -> Any:
            return call()

        self.telling = Telling(
            fleet.registry, self.name, self.journal, self.indexes, Counters(), at_once
        )
        self.telling.boot = fleet.registry.begin(self.name)

    def change(self, tier: str, key: bytes, part: int, cause: Cause | None) -> None:
        index = self.indexes[tier]
        if cause is not None:
            index.pop(key, part, cause)
        elif index.get(key, part) is None:
            index.claim(1)
            index.put(key, part, 1, 0.0)

    def step(self) -> bool:
        return asyncio.run(self.telling.step())

    def all_told(self) -> None:
        while self.step() or self.telling.behind:
            pass

    def held(self, tier: str) -> set[bytes]:
        with self.registry.call():
            found = self.registry.run(
                "SMEMBERS", self.registry.names.held(self.name, self.telling.boot, tier)
            )
        return set(found)

    def there(self, tier: str) -> set[bytes]:
        index = self.indexes[tier]
        return {
            holdings.id_of(key, part) for key in index.parts() for part, _ in index.objects(key)
        }


def replayed(entries: list[events.Entry]) -> dict[str, set[tuple[bytes, int]]]:
    """What a reader that began with nothing knows after these."""
    known: dict[str, set[tuple[bytes, int]]] = {tier: set() for tier in TIERS}
    for event in itertools.chain.from_iterable(entry.batch.events for entry in entries):
        keys = [event.keys[i : i + 32] for i in range(0, len(event.keys), 32)]
        objects = set(zip(keys, event.parts or [0] * len(keys), strict=True))
        if event.what == events.STORED:
            known[event.tier] |= objects
        elif event.what == events.REMOVED:
            assert event.cause
            known[event.tier] -= objects
        else:
            assert event.what == events.CLEARED
            known[event.tier].clear()
    return known


CHANGE = st.tuples(
    st.just("change"),
    st.sampled_from(TIERS),
    st.sampled_from(KEYS),
    st.sampled_from([0, 1]),
    st.sampled_from([None, None, Cause.EVICTED, Cause.CLEARED]),
)
STEP = st.tuples(st.just("step"), st.sampled_from(["well", "before", "after"]))
OTHER = st.tuples(st.sampled_from(["clear"]), st.sampled_from(TIERS)) | st.just(("forgotten",))


@settings(max_examples=60)
@given(history=st.lists(CHANGE | CHANGE | CHANGE | STEP | OTHER, max_size=40),
       most=st.sampled_from([5, 1000]))  # fmt: skip
def test_sets_and_events_are_what_the_node_has_whatever_fails(
    fleet: Fleet, history: list[Any], most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telling, "MOST_AT_ONCE", 3)
        publish, how = events.publish, ["well"]

        def failing(*arguments: Any) -> None:
            if how[0] == "before":
                raise TierUnavailable("before it was done")
            publish(*arguments)
            if how[0] == "after":
                raise TierUnavailable("after it was done")

        patch.setattr(events, "publish", failing)
        teller = Teller(fleet, most)
        for kind, *arguments in history:
            if kind == "change":
                teller.change(*arguments)
            elif kind == "clear":
                teller.indexes[arguments[0]].clear()
            elif kind == "forgotten":
                teller.telling.begin_anew()
            else:
                how[0] = arguments[0]
                try:
                    teller.step()
                except TierUnavailable:
                    assert how[0] != "well"
        how[0] = "well"
        teller.all_told()
        for tier in TIERS:
            assert teller.held(tier) == teller.there(tier)
        entries = events.Reader(fleet.registry, teller.name).read()
        assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
        assert not any(entry.gap for entry in entries)
        # After a reset the sets say what there is; without one the events do.
        if not any(one.what == events.RESET for entry in entries for one in entry.batch.events):
            assert teller.telling.lost == 0
            for tier, known in replayed(entries).items():
                assert {holdings.id_of(*one) for one in known} == teller.there(tier)
        else:
            assert most == 5 or ("forgotten",) in history


def test_a_reader_goes_on_where_it_was_and_sees_what_it_missed(fleet: Fleet) -> None:
    teller = Teller(fleet, 1000)
    reader, late = (events.Reader(fleet.registry, teller.name) for _ in range(2))
    assert reader.read() == []
    for number, key in enumerate(KEYS):
        teller.change("host", key, 0, None)
        teller.all_told()
        (entry,) = reader.read()
        assert (entry.boot, entry.number, entry.gap) == (teller.telling.boot, number + 1, False)
        (event,) = entry.batch.events
        assert (event.what, event.tier, event.keys) == (events.STORED, "host", key)
    names = fleet.registry.names
    with fleet.registry.call():
        fleet.registry.run("XTRIM", names.events(teller.name), "MAXLEN", 2)
    assert [entry.gap for entry in late.read()] == [True, False]
    # Another process begins with nothing, which is a gap to whoever read the one before.
    boot, teller.telling.boot = teller.telling.boot, fleet.registry.begin(teller.name)
    assert teller.telling.boot > boot
    teller.telling.batches = 0
    teller.change("disk", KEYS[0], 0, None)
    teller.all_told()
    (entry,) = reader.read()
    assert (entry.number, entry.gap) == (1, True)
    with fleet.registry.call():
        fleet.registry.run("XADD", names.events(teller.name), "*", "b", b"\xc1")
    with pytest.raises(Incompatible, match="no batch"):
        reader.read()


def test_a_cause_is_told_and_an_order_is_kept_within_a_batch(fleet: Fleet) -> None:
    teller = Teller(fleet, 1000)
    teller.change("host", KEYS[0], 0, None)
    teller.change("host", KEYS[1], 1, None)
    teller.change("host", KEYS[0], 0, Cause.EVICTED)
    teller.change("host", KEYS[0], 0, None)
    teller.change("host", KEYS[1], 1, Cause.CORRUPT)
    teller.all_told()
    (entry,) = events.Reader(fleet.registry, teller.name).read()
    assert [(e.what, e.cause, e.keys, e.parts) for e in entry.batch.events] == [
        ("stored", "", KEYS[0] + KEYS[1], [0, 1]),
        ("removed", "evicted", KEYS[0], []),
        ("stored", "", KEYS[0], []),
        ("removed", "corrupt", KEYS[1], [1]),
    ]


def test_a_node_tells_what_it_stores_and_forgets_while_the_registry_rests(fleet: Fleet) -> None:
    keys = chunk_keys(8, 7)
    node = fleet.join("storing", **{"host.capacity": "1MiB"})
    try:
        node.store(keys[:4])
        fleet.server.pause()
        node.store(keys)
        node.client.clear(keys[:1])
        until(lambda: not node.good)
        fleet.server.resume()
        until(lambda: node.good)
        node.told()
        until(lambda: not holdings.lookup(fleet.registry, keys))  # the first one has gone
        (found,) = holdings.lookup(fleet.registry, keys[1:])
        assert found.tiers == ["host"] * 7
    finally:
        fleet.server.resume()
        node.close()
