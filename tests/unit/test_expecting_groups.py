"""What a peer is about to have of several layer groups: what the prompt's end needs, or nothing."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.groups import FULL, STATE, WINDOW, Needs, longest_of, needed
from tests.support.members import Member
from tests.support.nodes import chunk_keys
from tests.support.peers_of_groups import (
    TAIL,
    held,
    load,
    match,
    nothing_is_on_its_way,
    store,
)

from kvstrata.config.network import TRUSTED
from kvstrata.node.service import expecting
from kvstrata.transfer.peers import NIXL
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

NEEDS: Needs = {FULL: 0, WINDOW: 2, STATE: 1}
ATTENTION: Needs = {FULL: 0, WINDOW: 2}
MODELS: list[Needs] = [NEEDS, ATTENTION, {WINDOW: 2, STATE: 1}, {STATE: 1}, {WINDOW: 3, FULL: 0}]
MAY_NAME: dict[str, Any] = {"peer.named": "loopback"}
ROOMY: dict[str, Any] = {"host.capacity": "4MiB"}
SMALL: dict[str, Any] = {"leases.per_client": "10%"}
PEER = 1
_prompts = itertools.count(1)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Member, Member]]:
    """A node that computes, and one that a request sends to it."""
    folder = tmp_path_factory.mktemp("deployment")
    with contextlib.ExitStack() as ends:
        a = Member(folder, **ROOMY)
        ends.callback(a.close)
        b = Member(folder, **ROOMY, **MAY_NAME)
        ends.callback(b.close)
        yield a, b.ready()


@pytest.fixture
def pair(both: tuple[Member, Member]) -> Iterator[tuple[Member, Member]]:
    yield both
    for member in both:
        nothing_is_on_its_way(member)
        member.inprocess.check_integrity()
        member.client.clear()


def new_keys(count: int = 6) -> list[bytes]:
    """Keys of a prompt that nobody has asked for."""
    return chunk_keys(count, 10_000 + next(_prompts))


def expect(pair: tuple[Member, Member], keys: list[bytes], needs: Needs, **more: Any) -> p.Matched:
    a, b = pair
    return match(b, keys, needs, peer=str(a.address), **{"expected_s": 600.0, **more})


def of_end(needs: Needs, count: int) -> set[tuple[int, int]]:
    """What a prompt's end needs, by part and number of the chunk."""
    return {
        (part, number)
        for part, need in needs.items()
        for number in range(count)
        if needed(need, count, number)
    }


def ready(b: Member, matched: p.Matched, have: int) -> int:
    """How many chunks are there, once there are more than that."""
    arrived: p.Arrived = b.client.await_arrival(matched.lease, have).wait(60.0)
    assert not arrived.failed
    return arrived.ready


def test_what_the_end_needs_comes_as_the_peer_stores_it(pair: tuple[Member, Member]) -> None:
    (a, b), keys = pair, new_keys()
    matched = expect(pair, keys, NEEDS)
    assert list(matched.tiers) == [PEER] * 6, "all of it is promised"
    places = offsets_of(matched.offsets).tolist()
    assert [places[i] for i in range(1, 18, 3)] == [p.NEEDLESS] * 4 + [p.ARRIVING] * 2
    assert [places[i] for i in range(2, 18, 3)] == [p.NEEDLESS] * 5 + [p.ARRIVING]
    store(a, keys, WINDOW, range(4))
    store(a, keys, FULL, range(3))
    assert ready(b, matched, 2) == 3
    store(a, keys, STATE, [2, 5])
    store(a, keys, FULL, range(3, 6))
    store(a, keys, WINDOW, [4, 5])
    before = b.counted("followed_chunks_total")
    assert load(b, keys, NEEDS, matched) == 6
    assert held(b, keys, NEEDS) == of_end(NEEDS, 6), "no window and no state before"
    assert b.counted("followed_chunks_total") <= before + 3


def test_what_is_not_said_to_come_is_not_waited_for(pair: tuple[Member, Member]) -> None:
    (a, b), keys = pair, new_keys()
    for part in NEEDS:
        store(a, keys, part, range(4))
    assert load(b, keys, NEEDS, expect(pair, keys, NEEDS, expected_s=0.0)) == 4


def test_what_is_here_or_there_already_is_not_waited_for(pair: tuple[Member, Member]) -> None:
    (a, b), keys = pair, new_keys()
    store(b, keys, FULL, range(5))
    store(a, keys, WINDOW, [4])
    matched = expect(pair, keys, NEEDS)
    for part, numbers in ((STATE, [5]), (WINDOW, [5]), (FULL, [5])):
        store(a, keys, part, numbers)
    assert load(b, keys, NEEDS, matched) == 6


@pytest.mark.parametrize("lost", [(FULL, 3), (WINDOW, 4), (STATE, 5)])
def test_what_does_not_come_fails_all_of_it_and_what_is_there_is_had_by_asking_again(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch, lost: tuple[int, int]
) -> None:
    monkeypatch.setattr(expecting, "LAST_S", 0.2)
    (a, b), keys = pair, new_keys()
    # All but a full part had: the prompt is computed, so what is left is waited for no longer.
    matched = expect(pair, keys, NEEDS, expected_s=0.3 if lost[0] == FULL else 600.0)
    for part in NEEDS:
        store(a, keys, part, [n for n in range(6) if (part, n) != lost])
    assert load(b, keys, NEEDS, matched) == 0
    nothing_is_on_its_way(b)
    again = expect(pair, keys, NEEDS, expected_s=0.0)
    assert load(b, keys, NEEDS, again) == {FULL: 3, WINDOW: 4, STATE: 5}[lost[0]]


def test_without_full_attention_nothing_tells_how_far_the_peer_is(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expecting, "LAST_S", 0.0)
    (a, b), keys, needs = pair, new_keys(), {WINDOW: 2, STATE: 1}
    matched = expect(pair, keys, needs)
    for number in (4, 5):
        store(a, keys, WINDOW, [number])
        b.until(lambda: (WINDOW, number) in held(b, keys, needs))  # noqa: B023 - called here
    store(a, keys, STATE, [5])
    assert load(b, keys, needs, matched) == 6


def test_the_end_that_fills_no_chunk_needs_one_more_of_a_window(
    pair: tuple[Member, Member],
) -> None:
    (a, b), keys = pair, new_keys()
    sizes = [TAIL, TAIL]
    matched = expect(pair, keys, ATTENTION, tail=sizes)
    for part in ATTENTION:
        store(a, keys, part, range(5))
        store(a, keys, part, [5], tail=True)
    assert load(b, keys, ATTENTION, matched, tail=True) == 6
    assert held(b, keys, ATTENTION) == of_end(ATTENTION, 6) | {(WINDOW, 3)}
    b.client.clear()
    again = expect(pair, keys, ATTENTION, tail=sizes, expected_s=0.0)
    assert load(b, keys, ATTENTION, again, tail=True) == 6, "it is there now"


@pytest.mark.parametrize("lost", [FULL, WINDOW])
def test_without_its_end_a_prompt_has_its_whole_chunks(
    pair: tuple[Member, Member], lost: int
) -> None:
    (a, b), keys = pair, new_keys()
    for part in ATTENTION:
        store(a, keys, part, range(5) if part == FULL else [3, 4])
        if part != lost:
            store(a, keys, part, [5], tail=True)
    sizes = [TAIL, TAIL]
    found = expect(pair, keys, ATTENTION, tail=sizes, expected_s=0.0)
    assert load(b, keys, ATTENTION, found) == 5


def test_two_that_wait_for_the_same_and_one_that_leaves(pair: tuple[Member, Member]) -> None:
    (a, b), keys = pair, new_keys()
    got: list[int] = []
    first = expect(pair, keys, NEEDS)
    waiting = [expect(pair, keys, needs) for needs in (NEEDS, ATTENTION)]
    threads = [
        threading.Thread(target=lambda m=one, n=needs: got.append(load(b, keys, n, m)))
        for one, needs in zip(waiting, (NEEDS, ATTENTION), strict=True)
    ]
    for thread in threads:
        thread.start()
    b.client.release(first.lease)
    for part in NEEDS:
        store(a, keys, part, range(6))
    for thread in threads:
        thread.join(60)
    assert got == [6, 6]


def test_a_reader_that_leaves_ends_it(pair: tuple[Member, Member]) -> None:
    (a, b), keys = pair, new_keys()
    for _ in range(3):
        b.client.release(expect(pair, keys, NEEDS).lease)
    nothing_is_on_its_way(b)
    for part in NEEDS:
        store(a, keys, part, range(6))
    assert load(b, keys, NEEDS, expect(pair, keys, NEEDS)) == 6


def test_a_clear_ends_it(pair: tuple[Member, Member]) -> None:
    (a, b), keys = pair, new_keys()
    matched = expect(pair, keys, NEEDS)
    store(a, keys, FULL, range(2))
    ready(b, matched, 0)
    b.client.clear()
    assert load(b, keys, NEEDS, matched) == 0


def test_a_peer_that_dies_ends_it(tmp_path: Path) -> None:
    keys = new_keys()
    a, b = Member(tmp_path), Member(tmp_path, **MAY_NAME)
    with contextlib.closing(b.ready()):
        matched = expect((a, b), keys, NEEDS, expected_s=600.0)
        store(a, keys, FULL, range(2))
        ready(b, matched, 0)
        a.close()
        assert load(b, keys, NEEDS, matched) == 0
        nothing_is_on_its_way(b)


def test_where_the_end_may_not_be_leased_what_is_there_is_had(tmp_path: Path) -> None:
    keys = new_keys(8)
    a = Member(tmp_path)
    b = Member(tmp_path, **MAY_NAME, **SMALL)
    with contextlib.closing(a), contextlib.closing(b.ready()):
        for part in NEEDS:
            store(a, keys, part, range(2))
        assert load(b, keys, NEEDS, expect((a, b), keys, NEEDS, expected_s=600.0)) == 2
        nothing_is_on_its_way(b)


def test_by_nixl_objects_of_all_groups_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nixl_cu12", reason="NIXL is not installed: scripts/install-dev.sh")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    common: dict[str, Any] = {"network.transport": NIXL, "network.trusted": TRUSTED}
    keys = new_keys()
    a, b = Member(tmp_path, **common), Member(tmp_path, **common, **MAY_NAME)
    with contextlib.closing(a), contextlib.closing(b.ready()):
        matched = expect((a, b), keys, ATTENTION, tail=[TAIL, TAIL])
        for part in ATTENTION:
            store(a, keys, part, range(5))
            store(a, keys, part, [5], tail=True)
        assert load(b, keys, ATTENTION, matched, tail=True) == 6
        assert a.counted('peer_sent_bytes_total{by="nixl"}') > 0
        assert a.counted('peer_sent_bytes_total{by="tcp"}') == 0


def test_one_node_for_both(tmp_path: Path) -> None:
    """Two engines of one machine: the one's node is the other's."""
    keys = new_keys()
    with contextlib.closing(Member(tmp_path, **MAY_NAME)) as a:
        a.ready()
        matched = expect((a, a), keys, NEEDS)
        for part in NEEDS:
            store(a, keys, part, range(6), lend=True)
        assert load(a, keys, NEEDS, matched) == 6


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_in_whatever_order_things_come_all_of_it_is_there_or_the_longest_that_is(
    pair: tuple[Member, Member], data: st.DataObject
) -> None:
    (a, b), count = pair, 5
    keys, needs = new_keys(count), data.draw(st.sampled_from(MODELS))
    names = [(part, number) for part in needs for number in range(count)]
    order = random.Random(data.draw(st.integers(0, 1000))).sample(names, len(names))
    early, here = (data.draw(st.sets(st.sampled_from(names))) for _ in range(2))
    lost = data.draw(st.none() | st.sampled_from(names))
    expecting_s, last_s = expecting.LAST_S, 0.1
    missing = lost in of_end(needs, count) and lost not in here and lost not in early

    def stores(member: Member, some: set[tuple[int, int]]) -> None:
        for part, number in [one for one in order if one in some]:
            store(member, keys, part, [number])

    expecting.LAST_S = last_s if missing else 600.0
    try:
        stores(b, here)
        stores(a, early)
        matched = expect(pair, keys, needs, expected_s=0.1 if missing else 600.0)
        assert len(matched.tiers) == count
        stores(a, set(names) - {lost} - early)
        assert load(b, keys, needs, matched) == (0 if missing else count)
    finally:
        expecting.LAST_S = expecting_s
    if missing:
        there = set(names) - ({lost} - early - here)
        assert load(b, keys, needs, expect(pair, keys, needs, expected_s=0.0)) == longest_of(
            there, needs, count
        )
    nothing_is_on_its_way(b)
    for member in pair:
        member.inprocess.check_integrity()
        member.client.clear()
