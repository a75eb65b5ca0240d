"""What a request asks of a node: which tiers to use, and what matters more than the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.members import Member
from tests.support.nodes import SLOT, chunk_keys, owned

from kvstrata.errors import UsageError
from kvstrata.policies import POLICIES
from kvstrata.wire.operator import Operator

KEYS = chunk_keys(4)
MiB = 1 << 20
MEMORY, DISK = 1, 2


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Callable[..., Member]]:
    """Makes nodes of one deployment, each with a client, and ends them."""
    with contextlib.ExitStack() as ends:

        def make(**options: Any) -> Member:
            made = Member(tmp_path, **options)
            ends.callback(made.close)
            return made

        yield make


@pytest.fixture
def both(member: Callable[..., Member], tmp_path: Path) -> Member:
    """A node with two slower tiers."""
    disk = {"disk.path": tmp_path / "disk", "disk.capacity": "8MiB", "disk.codec": "raw"}
    return member(**{"memory.capacity": "8MiB", "memory.codec": "raw", **disk})


def held(one: Member) -> dict[str, int]:
    """Chunks in each tier, once all is written."""
    one.client.flush()
    state = one.client.status()
    slower = {tier["name"]: tier["num_chunks"] for tier in state["tiers"] if "num_chunks" in tier}
    return {"host": state["host"]["num_chunks"], **slower}


@pytest.mark.parametrize(
    ("tiers", "memory", "disk"),
    [((), 4, 4), (("host",), 0, 0), (("disk",), 0, 4), (("memory", "disk"), 4, 4)],
)
def test_what_is_stored_goes_to_the_tiers_that_were_named(
    both: Member, tiers: tuple[str, ...], memory: int, disk: int
) -> None:
    both.store(KEYS, tiers=tiers)
    assert held(both) == {"host": 4, "memory": memory, "disk": disk}


@pytest.mark.parametrize(
    ("tiers", "found"),
    [((), [DISK] * 4), (("disk",), [DISK] * 4), (("memory",), []), (("host",), [])],
)
def test_what_is_loaded_comes_from_the_tiers_that_were_named(
    both: Member, tiers: tuple[str, ...], found: list[int]
) -> None:
    both.store(KEYS, tiers=["disk"])
    both.client.flush()
    both.client.clear(tiers=["host"])
    assert both.get(KEYS, tiers=tiers) == found
    copied_up = 4 if found and not tiers else 0
    assert held(both) == {"host": len(found), "memory": copied_up, "disk": 4}


def test_what_is_in_host_memory_counts_whatever_was_named(both: Member) -> None:
    both.store(KEYS)
    assert both.get(KEYS, tiers=["disk"]) == [0] * 4


def test_a_tier_that_is_not_there_is_an_error(both: Member) -> None:
    with pytest.raises(UsageError, match="no tier 'redis' here"):
        both.match(KEYS, tiers=["disk", "redis"])
    with pytest.raises(UsageError, match="no tier 'redis' here"):
        both.store(KEYS, tiers=["redis"])
    assert held(both) == {"host": 0, "memory": 0, "disk": 0}


def test_others_are_asked_only_where_they_may_be_used(member: Callable[..., Member]) -> None:
    a = member()
    b = member(peers=[a.address]).ready()
    a.store(KEYS)
    assert b.get(KEYS, tiers=["host"]) == []
    assert b.counted("lookup_rounds_total") == 0, "it was not even asked"
    assert b.get(KEYS, tiers=["peer"]) == [1] * 4
    assert b.counted("lookup_rounds_total") > 0


def test_a_peer_that_the_request_names_may_always_be_used(member: Callable[..., Member]) -> None:
    a, b = member(), member(**{"peer.named": "loopback"}).ready()
    a.store(KEYS)
    assert b.get(KEYS, tiers=["host"]) == []
    assert b.get(KEYS, tiers=["host"], peer=str(a.address)) == [1] * 4


@pytest.mark.parametrize("priority", [-2, 4])
def test_what_is_no_priority_is_an_error(both: Member, priority: int) -> None:
    with pytest.raises(UsageError, match="-1 to 3"):
        both.store(KEYS, priority=priority)


def storm(one: Member, num_chunks: int) -> None:
    """Others store so much, eight chunks at a time."""
    for start in range(0, num_chunks, 8):
        one.store(chunk_keys(min(8, num_chunks - start), prompt=1000 + start))


def left(one: Member, prompt: int) -> int:
    """Of a prompt of 32 chunks, those in host memory."""
    return one.client.lookup(chunk_keys(32, prompt=prompt), [0]).count(0)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_matters_less_goes_first_from_host_memory(
    member: Callable[..., Member], policy: str
) -> None:
    one = member(**{"host.policy": policy})
    for prompt, priority in ((1, 0), (2, -1)):
        one.store(chunk_keys(32, prompt=prompt), priority=priority, cost=0.1)
    storm(one, MiB // SLOT - 64 + 32)
    assert (left(one, 1), left(one, 2)) == (32, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_matters_more_stays_longer_in_host_memory(
    member: Callable[..., Member], policy: str
) -> None:
    one = member(**{"host.policy": policy})
    for prompt, priority in ((1, 3), (2, 0)):
        one.store(chunk_keys(32, prompt=prompt), priority=priority, cost=0.1)
    storm(one, MiB // SLOT)
    assert left(one, 1) == 32
    assert left(one, 2) == 0


def priorities(one: Member) -> list[list[int]]:
    """Of the chunks, in host memory and in each slower tier."""
    node = one.inprocess.node
    says = [node.host.index.priority_of, owned(node, 0).index.priority_of,
            owned(node, 1).index.priority_of]  # fmt: skip
    found: list[list[int]] = one.inprocess.run(lambda: [[say(key) for key in KEYS] for say in says])
    return found


def test_a_priority_goes_with_its_chunks_from_tier_to_tier(both: Member) -> None:
    both.store(KEYS, priority=-1)
    both.client.flush()
    both.client.clear(tiers=["host", "memory"])
    assert both.get(KEYS) == [DISK] * 4
    both.client.flush()
    assert priorities(both) == [[-1] * 4] * 3


def test_a_priority_goes_with_what_an_operator_moves(both: Member) -> None:
    operator = Operator(both.client)
    both.store(KEYS, priority=2, tiers=["host"])
    for number, (source, target) in enumerate([("host", "memory"), ("memory", "disk")], 1):
        assert operator.wait(operator.copy(KEYS, source, target, move=True), 20.0).done == 4
        assert priorities(both)[number] == [2] * 4
    assert operator.wait(operator.copy(KEYS, "disk", "host"), 20.0).done == 4
    assert priorities(both) == [[2] * 4, [0] * 4, [2] * 4]
