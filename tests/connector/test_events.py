"""Routers that read vLLM's own KV events learn what the node has: decoded by vLLM's own classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.connector.fake_model import BLOCK, CHUNK
from tests.connector.rig import Rig, prompt
from tests.support.subscribers import Subscriber, until
from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvstrata.connectors.vllm import events
from kvstrata.connectors.vllm.events import Events, Shape

Make = Callable[..., Rig]

DOCUMENT = prompt(3 * CHUNK)
WHOLE = sorted(DOCUMENT)
GPU = "GPU"


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Subscriber]:
    one = Subscriber(tmp_path)
    yield one
    one.close()


def tokens(known: dict[Any, list[int]]) -> list[int]:
    return sorted(token for block in known.values() for token in block)


def watched(rig: Rig) -> Rig:
    watch = rig.side._lookups._watch
    assert watch is not None
    rig.until(watch.watching.is_set)
    return rig


@pytest.mark.parametrize(("ranks", "draft"), [(1, None), (2, None), (1, 0)])
def test_what_is_stored_and_removed_is_told_by_medium(
    make_rig: Make, router: Subscriber, tmp_path: Path, ranks: int, draft: int | None
) -> None:
    disk = {"disk.path": str(tmp_path / "disk"), "disk.capacity": "4MiB"}
    rig = watched(make_rig(events=router.config, extra=disk, ranks=ranks, draft=draft))
    assert rig.side._lookups.events is not None
    assert rig.side._lookups.events.parts == rig.side._lookups.parts, "a draft's layers, too"
    assert rig.node is not None
    client = rig.node.connect()
    rig.ask(DOCUMENT)
    rig.settle()
    client.flush()
    until(lambda: len(router.known(MEDIUM_STORAGE)) == len(DOCUMENT) // BLOCK, rig.step)
    for medium in (MEDIUM_CPU, MEDIUM_STORAGE):
        stored = [one for one in router.events(medium) if isinstance(one, BlockStored)]
        assert len(stored) == 3, "once for each chunk"
        known = router.known(medium)
        assert tokens(known) == WHOLE
        # They are the hashes that vLLM itself tells of its own blocks, and of these tokens.
        own = router.known(GPU)
        assert {one: own[one] for one in known} == known
        by_parent = {one.parent_block_hash: one for one in stored}
        first = by_parent[None]
        assert (first.block_size, first.lora_id, first.group_idx) == (BLOCK, None, 0)
        assert (first.ownership, first.locality) == ("kvstrata", "LOCAL")
        assert by_parent[first.block_hashes[-1]].token_ids == DOCUMENT[CHUNK : 2 * CHUNK]
    client.clear(tiers=["host"])
    until(lambda: not router.known(MEDIUM_CPU), rig.step)
    assert tokens(router.known(MEDIUM_STORAGE)) == WHOLE
    # It is loaded from the disk, so it is in host memory again.
    rig.reset()
    assert rig.ask(DOCUMENT) > 0
    until(lambda: tokens(router.known(MEDIUM_CPU)) == WHOLE, rig.step)
    client.clear()
    until(lambda: not router.known(MEDIUM_CPU) and not router.known(MEDIUM_STORAGE), rig.step)
    client.close()
    rig.check()


def test_salted_requests_are_left_out(make_rig: Make, router: Subscriber) -> None:
    rig = watched(make_rig(events=router.config))
    rig.ask(prompt(2 * CHUNK, seed=5), cache_salt="alice")
    rig.ask(DOCUMENT)
    rig.settle()
    until(lambda: tokens(router.known(MEDIUM_CPU)) == WHOLE, rig.step)
    rig.check()


def test_an_engine_tells_of_what_another_one_stored_when_it_finds_it(
    make_rig: Make, router: Subscriber
) -> None:
    first = make_rig()
    first.warm(DOCUMENT)
    second = watched(make_rig(events=router.config, node=first.node, path=first.path))
    assert router.known(MEDIUM_CPU) == {}
    assert second.ask(DOCUMENT) > 0
    until(lambda: len(tokens(router.known(MEDIUM_CPU))) == 3 * CHUNK, second.step)
    second.check()


def test_a_node_that_is_gone_has_nothing_and_one_that_is_found_again_is_asked(
    make_rig: Make, router: Subscriber
) -> None:
    rig = watched(make_rig(events=router.config))
    rig.ask(DOCUMENT)
    rig.settle()
    until(lambda: tokens(router.known(MEDIUM_CPU)) == WHOLE, rig.step)
    told = rig.side._lookups.events
    assert told is not None
    told.lose()  # as when the node's journal has gone on too far
    until(lambda: not router.known(MEDIUM_CPU), rig.step)
    watch = rig.side._lookups._watch
    assert watch is not None
    client = watch._meet(rig.config)
    told.see(told.known(), ["host" if tier != 255 else "" for tier in
                            client.lookup(told.known(), told.parts)])  # fmt: skip
    client.close()
    until(lambda: tokens(router.known(MEDIUM_CPU)) == WHOLE, rig.step)
    rig.stop_node()
    until(lambda: not router.known(MEDIUM_CPU), rig.step)
    rig.ask(prompt(CHUNK, seed=3))  # by which the engine notices
    rig.start_node()
    rig.attach()
    watched(rig)
    rig.reset()
    rig.ask(DOCUMENT)
    rig.settle()
    until(lambda: tokens(router.known(MEDIUM_CPU)) == WHOLE, rig.step)
    # What a reset leaves is of no use to anybody.
    assert rig.scheduler.reset_prefix_cache(reset_connector=True)
    until(lambda: not router.known(MEDIUM_CPU), rig.step)
    rig.check()


def test_nothing_is_remembered_where_vllm_publishes_nothing(make_rig: Make) -> None:
    rig = make_rig()
    assert rig.side._lookups.events is None
    assert list(rig.connector.take_events()) == []


class Asked:
    """As much of a request as `Events` looks at."""

    def __init__(self, seed: int, chunks: int = 1) -> None:
        self.cache_salt = None
        self.lora_request = None
        self.all_token_ids = prompt(chunks * CHUNK, seed=seed)
        self.block_hashes = [bytes([seed, i]) for i in range(chunks * CHUNK // BLOCK)]
        self.told = [maybe_convert_block_hash(one) for one in self.block_hashes]
        self.request = self
        self.keys = [bytes([seed, i]) * 16 for i in range(chunks)]


def test_heads_are_told_before_tails() -> None:
    """Some routers know nothing of a block whose parent they do not know."""
    told = Events(Shape(CHUNK, BLOCK, BLOCK, "full_attention"))
    asked = Asked(1, 4)
    told.note(asked, 0, 4)  # type: ignore[arg-type]
    for key in reversed(asked.keys):
        told.hear("host", "entered", key, 0)
    told.hear("host", "evicted", asked.keys[3], 0)
    told.hear("host", "entered", asked.keys[3], 0)
    *stored, removed, again = told.take()
    assert [one for event in stored for one in event.block_hashes] == asked.told
    assert [event.parent_block_hash for event in stored] == [
        None,
        *(event.block_hashes[-1] for event in stored[:-1]),
    ]
    assert isinstance(removed, BlockRemoved)
    assert removed.block_hashes == again.block_hashes == stored[3].block_hashes


def replayed(taken: list[Any], known: set[Any]) -> set[Any]:
    for event in taken:
        change = known.update if isinstance(event, BlockStored) else known.difference_update
        change(event.block_hashes)
    return known


def test_of_very_many_the_oldest_are_said_to_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_CHUNKS", 3)
    told = Events(Shape(CHUNK, BLOCK, BLOCK, "full_attention"))
    asked = [Asked(seed) for seed in range(5)]
    for one in asked:
        told.note(one, 0, 1)  # type: ignore[arg-type]
        told.hear("host", "entered", one.keys[0], 0)
    known = replayed(told.take(), set())
    assert known == {one for last in asked[2:] for one in last.told}
    assert told.known() == [one.keys[0] for one in asked[2:]]


def test_an_engine_that_stands_still_keeps_little_and_says_nothing_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "MOST_EVENTS", 6)
    told = Events(Shape(CHUNK, BLOCK, BLOCK, "full_attention"))
    asked = [Asked(seed) for seed in range(4)]
    known: set[Any] = set()
    there: set[bytes] = set()
    for one in asked:
        told.note(one, 0, 1)  # type: ignore[arg-type]
    for turn in range(60):
        key = asked[turn * 7 % 4].keys[0]
        what = "cleared" if key in there else "entered"
        (there.discard if key in there else there.add)(key)
        told.hear("host", what, key, 0)
        told.hear("redis", "entered", key, 0)
        assert len(told._out) <= 6
        if turn % 20 == 19:
            known = replayed(told.take(), known)
            really = {h for one in asked if one.keys[0] in there for h in one.told}
            assert known <= really, "a router is sent to what is not there"
    told.hear("host", "emptied", b"", 0)
    assert replayed(told.take(), known) == set()
