"""Nodes of a fleet: who is there, what each holds, and what all of them are told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.nodes import NAMESPACE, ORDER, chunk_keys
from tests.support.registries import SHORT_S, Fleet, fleet_in, until

from kvstrata.errors import TierUnavailable, UsageError
from kvstrata.fleet import commands, holdings
from kvstrata.fleet.members import Holding, Member
from kvstrata.node.service.names import Where
from kvstrata.testing.servers.redis import installed
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p
from kvstrata.wire.operator import Operator

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

KEYS = chunk_keys(6)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_in(tmp_path) as fleet:
        yield fleet


@pytest.fixture
def fleeting(tmp_path: Path) -> Iterator[Fleet]:
    """One whose registrations run out soon."""
    with fleet_in(tmp_path, SHORT_S) as fleet:
        yield fleet


def test_members_are_there_as_long_as_they_say_so(fleeting: Fleet) -> None:
    a, b = fleeting.join("a"), fleeting.join("b", **{"disk.path": str(fleeting.folder / "d"),
                                               "disk.capacity": "1MiB"})  # fmt: skip
    a.store(KEYS)
    until(lambda: fleeting.members()["a"].tiers[0].num_chunks == len(KEYS))
    said = fleeting.members()
    assert sorted(said) == ["a", "b"]
    assert [one.tier for one in said["b"].tiers] == ["host", "disk"]
    assert said["a"].tiers[0].capacity_bytes == 1 << 20
    assert abs(said["a"].clock_offset_s) < 1.0
    assert a.client.status()["fleet"]["state"] == "member"
    gauges = {one.name: one.value for one in a.client.metrics().values}
    assert gauges["fleet_ok"] == 1
    assert abs(gauges["fleet_clock_offset_seconds"]) < 1.0
    until(lambda: all(one.value == 0 for one in a.client.metrics().values
                      if one.name == "fleet_untold_chunks"))  # fmt: skip
    b.close()  # who ends says so
    assert sorted(fleeting.members()) == ["a"]
    # One that says nothing any more is gone when its registration has run out.
    a.inprocess.run(a.fleet._tasks.cancel)
    assert sorted(fleeting.members()) == ["a"]
    until(lambda: not fleeting.members())
    assert not a.good


def test_a_second_node_of_a_name_takes_it_and_the_first_one_shares_nothing_more(
    fleet: Fleet,
) -> None:
    first = fleet.join("a")
    assert first.good
    second = fleet.join("a")
    until(lambda: not first.good)
    assert second.good
    assert "fleet.name" in first.client.status()["fleet"]["state"]
    first.close()  # and does not end the other one's registration
    assert sorted(fleet.members()) == ["a"]


def test_a_node_that_has_its_name_again_tells_what_it_holds_by_a_new_boot(fleet: Fleet) -> None:
    first = fleet.join("a")
    first.store(KEYS)
    first.told()
    second = fleet.join("a")
    until(lambda: not first.good)
    second.store(chunk_keys(3, 9))
    second.told()
    later = fleet.members()["a"].boot
    second.close()
    until(lambda: first.good and fleet.members()["a"].boot > later)
    more = chunk_keys(6, 1)
    first.store(more)

    def found(keys: list[bytes]) -> list[int]:
        return [len(one.tiers) for one in holdings.lookup(fleet.registry, keys)]

    until(lambda: found(KEYS) == found(more) == [6])
    Operator(first.client).clear(keys=KEYS)
    until(lambda: not holdings.lookup(fleet.registry, KEYS))
    assert found(more) == [6]


@pytest.mark.parametrize("fields", [{"x": "y"}, {"c": "\x93 no command"}, {"c": ""}])
def test_an_entry_that_is_no_command_is_passed_over(fleet: Fleet, fields: dict[str, str]) -> None:
    a = fleet.join("a")
    fleet.server.admin().xadd(fleet.registry.names.commands, fields, id="1-0")
    until(lambda: a.fleet.shown()["seen"] == 1)
    assert a.good
    assert commands.give(fleet.registry, p.Flush(0), 20.0).done
    assert fleet.join("b").good


def test_a_mistake_of_ours_in_a_command_ends_no_membership(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: p.Request) -> None:
        raise RuntimeError("of ours")

    a = fleet.join("a")
    monkeypatch.setattr(a.fleet._obey, "_work", fail)
    assert "of ours" in commands.give(fleet.registry, p.Flush(0), 20.0).failed["a"].message
    assert a.good


def test_a_registry_that_has_just_lost_its_memory_is_waited_out(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = fleet.join("a")
    a.store(KEYS)
    monkeypatch.setattr(commands, "LASTS_S", 1.0)
    fleet.server.admin().flushall()
    begun = time.monotonic()
    answers = commands.give(fleet.registry, p.Clear(0), 20.0)
    assert time.monotonic() - begun >= 0.9
    assert answers.done
    assert "a" in answers.answered
    assert not a.has(KEYS)
    fleet.server.admin().flushall()
    until(lambda: a.good)
    monkeypatch.setattr(commands, "LASTS_S", 20.0)
    with pytest.raises(TierUnavailable, match="lost its memory"):
        commands.give(fleet.registry, p.Clear(0), 0.5)


def test_a_clear_of_a_tier_that_nobody_has_is_refused(fleet: Fleet) -> None:
    a = fleet.join("a")
    until(lambda: a.good)
    with pytest.raises(UsageError, match=r"'dsik'; there are host"):
        commands.give(fleet.registry, p.Clear(0, None, ["dsik"]), 20.0)
    assert commands.give(fleet.registry, p.Clear(0, None, ["host"]), 20.0).done


def test_the_registry_knows_which_chunks_a_node_has_in_which_tier(fleet: Fleet) -> None:
    disk = {"disk.path": str(fleet.folder / "disk"), "disk.capacity": "1MiB"}
    a, b = fleet.join("a"), fleet.join("b", **disk)
    a.store(KEYS[:4])
    b.store(KEYS[:2])
    b.client.flush()
    b.client.clear(KEYS[1:2], ["host"])
    for node in (a, b):
        node.told()
    found = holdings.lookup(fleet.registry, KEYS)
    assert [(one.member.name, one.tiers) for one in found] == [
        ("a", ["host"] * 4),
        ("b", ["host", "disk"]),
    ]
    # A hole ends what leads.
    a.client.clear(KEYS[2:3])
    a.told()
    found = holdings.lookup(fleet.registry, KEYS)
    assert [len(one.tiers) for one in found] == [2, 2]
    a.client.clear()
    a.told()
    assert [one.member.name for one in holdings.lookup(fleet.registry, KEYS)] == ["b"]
    assert holdings.lookup(fleet.registry, []) == []


def test_a_chunk_of_several_parts_is_there_with_all_of_them(fleet: Fleet) -> None:
    registry = fleet.registry
    tiers = [Holding("host"), Holding("disk"), Holding("redis", shared=True)]
    one = Member("x", 1, "r", p.PROTOCOL_VERSION, 1, tiers=tiers)
    registry.renew(one, 60.0, None)
    held = {"host": [(0, 0), (0, 1), (1, 0), (2, 0)], "disk": [(1, 1), (2, 0)]}
    for tier, objects in held.items():
        ids = [holdings.id_of(KEYS[chunk], part) for chunk, part in objects]
        with registry.call():
            registry.run("SADD", registry.names.held("x", 1, tier), *ids)
    (found,) = holdings.lookup(registry, KEYS, [0, 1])
    assert found.tiers == ["host", "disk"]
    (found,) = holdings.lookup(registry, KEYS, [0])
    assert found.tiers == ["host"] * 3


def test_a_clear_is_done_when_every_node_has_done_it(fleet: Fleet) -> None:
    nodes = [fleet.join(name) for name in "abc"]
    for node in nodes:
        node.store(KEYS)
    answers = commands.give(fleet.registry, p.Clear(0), 20.0)
    assert answers.done
    assert sorted(answers.answered) == ["a", "b", "c"]
    assert all(one == p.Done(0, len(KEYS)) for one in answers.answered.values())
    assert [node.has(KEYS) for node in nodes] == [0, 0, 0]
    # Some keys alone, and of one node alone.
    for node in nodes:
        node.store(KEYS)
    some = p.Clear(0, b"".join(KEYS[:2]), ["host"])
    assert commands.give(fleet.registry, some, 20.0, ["b"]).answered == {"b": p.Done(0, 2)}
    assert [node.has(KEYS) for node in nodes] == [6, 4, 6]
    assert commands.give(fleet.registry, p.Flush(0), 20.0).done


def test_what_no_node_may_be_told_is_refused_by_each(fleet: Fleet) -> None:
    fleet.join("a")
    answers = commands.give(fleet.registry, p.Status(0), 20.0)
    assert not answers.done
    assert answers.failed["a"].kind == "UsageError"
    with pytest.raises(UsageError, match="no node 'z'"):
        commands.post(fleet.registry, p.Flush(0), 1.0, ["z"])
    # Nonsense in the stream is passed over, and what follows is done.
    with fleet.registry.call():
        fleet.registry.run("XADD", fleet.registry.names.commands, "2-0", "c", b"\xc1nonsense")
    assert commands.give(fleet.registry, p.Flush(0), 20.0).done


def test_a_node_that_was_away_does_what_it_missed_before_it_serves(fleet: Fleet) -> None:
    """Killed with its registration, it comes back with what its disk had."""
    disk = {"disk.path": str(fleet.folder / "disk"), "disk.capacity": "1MiB"}
    a, b = fleet.join("a"), fleet.join("b", **disk)
    for node in (a, b):
        node.store(KEYS)
    b.client.flush()
    b.close()
    answers = commands.give(fleet.registry, p.Clear(0), 20.0)
    assert answers.done
    assert sorted(answers.answered) == ["a"]
    b = fleet.join("b", **disk)
    assert b.has(KEYS) == 0
    assert b.fleet.shown()["seen"] == 1
    # It was once: what is stored after it stays over the next start.
    b.store(KEYS)
    b.client.flush()
    b.close()
    b = fleet.join("b", **disk)
    until(lambda: b.has(KEYS) == len(KEYS))


def test_a_node_that_dies_in_the_middle_is_waited_for_until_its_registration_ends(
    fleeting: Fleet,
) -> None:
    a, b = fleeting.join("a"), fleeting.join("b")
    b.inprocess.run(b.fleet._tasks.cancel)  # it does nothing any more, as if it were killed
    answers = commands.give(fleeting.registry, p.Clear(0), 20.0)
    assert answers.done
    assert answers.gone == ["b"]
    assert sorted(answers.answered) == ["a"]
    assert not b.good, "done while another node still relied on its registration"
    until(lambda: a.good)


def test_a_node_that_cannot_do_it_in_time_is_named(fleet: Fleet) -> None:
    a = fleet.join("a")
    a.fleet._obey.carry_out = _never  # type: ignore[method-assign,assignment]
    answers = commands.give(fleet.registry, p.Clear(0), 0.5)
    assert answers.silent == ["a"]
    assert not answers.done


async def _never(*arguments: object) -> object:
    import asyncio

    await asyncio.Event().wait()
    raise AssertionError


def test_a_node_without_the_registry_uses_nothing_that_it_shares(fleeting: Fleet) -> None:
    """And comes back to it by itself, with what was told in the meantime done."""
    peers = {"network.listen": "127.0.0.1:0", "peer.nodes": "fleet", "peer.lookup_timeout": "2s"}
    a, b = fleeting.join("a", **peers), fleeting.join("b", **peers)
    a.store(KEYS)
    a.told()
    until(lambda: len(b.get(KEYS)) == len(KEYS))
    b.client.clear()
    name = Where(0, NAMESPACE, ORDER).name(KEYS[0], 0)

    def lent() -> list[int]:
        return a.inprocess.node.lender.sizes([name])

    assert a.inprocess.run(lent) != [0]
    fleeting.server.pause()
    until(lambda: not a.good and not b.good)
    assert b.get(KEYS) == []
    assert a.get(KEYS) == [0] * len(KEYS)  # what is its own it serves
    assert a.inprocess.run(lent) == [0]
    fleeting.server.resume()
    until(lambda: a.good and b.good)
    until(lambda: len(b.get(KEYS)) == len(KEYS))


def test_a_registry_that_lost_its_memory_learns_all_of_it_again(fleet: Fleet) -> None:
    a = fleet.join("a")
    a.store(KEYS)
    a.told()
    for _ in range(3):
        commands.give(fleet.registry, p.Flush(0), 20.0)
    fleet.registry.renew(Member("mute", 1, "r", p.PROTOCOL_VERSION, 1), 60.0, None)
    posted = commands.post(fleet.registry, p.Flush(0), 20.0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(commands.wait, fleet.registry, posted, 20.0)
        fleet.server.restart()
        with pytest.raises(TierUnavailable):
            waiting.result()
    until(lambda: a.good and "a" in fleet.members())
    # Commands are numbered from 1 again, and none of them is passed over.
    assert commands.post(fleet.registry, p.Flush(0), 20.0).number == 1
    until(lambda: a.fleet.shown()["seen"] == 1)
    a.told()
    until(lambda: [len(one.tiers) for one in holdings.lookup(fleet.registry, KEYS)] == [len(KEYS)])


def test_one_after_the_other_stops_at_the_first_that_fails(fleet: Fleet) -> None:
    for name in "abc":
        fleet.join(name)
    order: list[str] = []
    answers = commands.one_by_one(
        fleet.registry, p.Flush(0), 20.0, lambda name, reply: order.append(name)
    )
    assert answers.done
    assert order == ["a", "b", "c"]
    answers = commands.one_by_one(fleet.registry, p.Status(0), 20.0)
    assert list(answers.failed) == ["a"]
    assert answers.silent == ["b", "c"]


def test_a_fleet_is_drained_node_by_node_and_takes_stores_again(fleet: Fleet) -> None:
    names = ("a", "b")
    disks = {
        name: {"disk.path": str(fleet.folder / name), "disk.capacity": "1MiB"} for name in names
    }
    nodes = [fleet.join(name, **disks[name]) for name in names]
    for node in nodes:
        node.store(KEYS[:2])
    states: list[list[str]] = []

    def tell(name: str, reply: p.Reply) -> None:
        until(lambda: fleet.members()[name].state == "draining")
        states.append([one.state for one in fleet.members().values()])

    answers = commands.one_by_one(fleet.registry, o.Drain(0), 20.0, tell)
    assert answers.done
    assert states == [["draining", "member"], ["draining", "draining"]]
    for node in nodes:
        assert node.client.lookup(KEYS[:2], [0]) == b"\0\0"
        node.store(KEYS)
        assert node.has(KEYS) == 2
    # In their disks it is, too: whatever was stored before is written.
    for node in nodes:
        node.client.clear(tiers=["host"])
        assert node.client.lookup(KEYS[:2], [0]) == b"\1\1"
    refused = commands.give(fleet.registry, o.Scrub(0, "disk"), 20.0)
    assert {one.kind for one in refused.failed.values()} == {"Busy"}
    assert commands.give(fleet.registry, o.Undrain(0), 20.0).done
    for node in nodes:
        node.store(KEYS)
        assert node.has(KEYS) == len(KEYS)
    answers = commands.give(fleet.registry, o.Scrub(0, "disk"), 20.0, ["b"])
    (page,) = answers.answered.values()
    assert isinstance(page, o.JobPage)
    assert page.jobs[0].state == "done"
    refused = commands.give(fleet.registry, o.Drain(0, True), 20.0, ["a"])
    assert refused.failed["a"].kind == "UsageError"  # it is this program's to end


def test_an_answer_to_what_another_registry_asked_is_not_written(fleet: Fleet) -> None:
    """Or the numbers of this one would be passed over, which began again."""
    one = Member("x", 1, "r", p.PROTOCOL_VERSION, 1)
    generation = fleet.registry.renew(one, 60.0, None).generation
    posted = commands.post(fleet.registry, p.Flush(0), 60.0)
    commands.answer(fleet.registry, b"another", one, posted.number, p.Done(0, 0))
    assert fleet.registry.renew(one, 60.0, None).seen == 0
    assert commands.wait(fleet.registry, posted, 0.0).silent == ["x"]
    commands.answer(fleet.registry, generation, one, posted.number, p.Done(0, 3))
    assert fleet.registry.renew(one, 60.0, None).seen == posted.number == 1
    assert commands.wait(fleet.registry, posted, 20.0).answered == {"x": p.Done(0, 3)}
