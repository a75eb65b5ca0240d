"""The budget of an object store: who sweeps, what goes, and in which order; with real stores."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support.object_stores import let_in

from kvstrata.errors import CorruptObject
from kvstrata.testing.clock import ManualClock
from kvstrata.testing.servers.seaweedfs import BUCKET, READER_KEY, SeaweedFS
from kvstrata.testing.shared import name
from kvstrata.testing.stores import HIT, MISS, PAGE, filled, has, read_one, write
from kvstrata.tiers.object_store.client import ObjectClient, Turn
from kvstrata.tiers.object_store.lease import Lease
from kvstrata.tiers.object_store.paths import LEASE, USES
from kvstrata.tiers.object_store.sweep import Sweep
from kvstrata.tiers.object_store.tier import ObjectStoreTier
from kvstrata.tiers.object_store.uses import (
    KEEP_S,
    LastUses,
    Notes,
    decode_note,
    encode_note,
)

Make = Callable[..., ObjectStoreTier]
SIZE = 4 * PAGE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    server = SeaweedFS(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    let_in(monkeypatch)


@pytest.fixture(params=["s3", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Where an empty store is, as arguments of a tier or a client."""
    if request.param == "folder":
        return {"url": f"file://{tmp_path}", "timeout_s": 8.0}
    server = request.getfixturevalue("server")
    where = f"s3://{BUCKET}/{tmp_path.name}"
    return {"url": where, "timeout_s": 8.0, "endpoint": server.endpoint}


@pytest.fixture
def folder(tmp_path: Path) -> dict[str, Any]:
    """Likewise, in a folder, whose times are fine enough to tell an order from."""
    return {"url": f"file://{tmp_path}", "timeout_s": 8.0}


@pytest.fixture
def make() -> Iterator[Make]:
    """Make a tier that sweeps at each upkeep, and notes uses at each too."""
    made = []

    def one(place: dict[str, Any], num_objects: float = 1000, **options: Any) -> ObjectStoreTier:
        settings = {"pass_every_s": 0.0, "note_every_s": 0.0, **options}
        made.append(ObjectStoreTier(**place, capacity_bytes=int(num_objects * SIZE), **settings))
        return made[-1]

    yield one
    for tier in made:
        tier.close()


def store(tier: ObjectStoreTier, count: int, first: int = 0) -> list[bytes]:
    """Objects of `SIZE` each, written one after the other."""
    names = [name(i, tier.epoch().number) for i in range(first, first + count)]
    for one in names:
        assert write(tier, [(one, filled(SIZE, 1))]) == [HIT]
    return names


def left(tier: ObjectStoreTier, names: Sequence[bytes]) -> list[int]:
    """Which are still there, by their place."""
    return [i for i, answer in enumerate(has(tier, names)) if answer is HIT]


# the lease


def race(leases: Sequence[Lease], client: ObjectClient) -> list[bool]:
    start = threading.Barrier(len(leases))

    def hold(lease: Lease) -> bool:
        start.wait()
        return lease.hold(client.turn())

    with ThreadPoolExecutor(len(leases)) as threads:
        return list(threads.map(hold, leases))


def test_of_those_who_want_the_lease_one_gets_it(place: dict[str, Any]) -> None:
    for number in range(20):
        where = {**place, "url": f"{place['url']}/{number}"}
        if place["url"].startswith("file:"):
            Path(where["url"].removeprefix("file://")).mkdir()
        client = ObjectClient(**where)
        leases = [Lease(client, 60.0) for _ in range(2)]
        assert sorted(race(leases, client)) == [False, True], number
        assert sorted(lease.held for lease in leases) == [False, True]


def test_of_those_who_take_it_over_one_does(place: dict[str, Any]) -> None:
    clock, client = ManualClock(), ObjectClient(**place)
    holder = Lease(client, 60.0, clock)
    assert holder.hold(client.turn())
    for number in range(20):
        others = [Lease(client, 60.0, clock) for _ in range(2)]
        assert [other.hold(client.turn()) for other in others] == [False] * 2
        clock.advance(60.0)
        assert not holder.held
        assert sorted(race(others, client)) == [False, True], number
        holder = next(other for other in others if other.held)


def test_a_holder_that_writes_it_again_keeps_it(folder: dict[str, Any]) -> None:
    clock, client = ManualClock(), ObjectClient(**folder)
    holder, other = (Lease(client, 60.0, clock) for _ in range(2))
    for _ in range(20):
        assert holder.hold(client.turn())
        assert not other.hold(client.turn())
        clock.advance(29.0)
        assert holder.held
        assert not other.hold(client.turn())
    clock.advance(2.0)
    assert not holder.held, "it may rely on half of the time"
    clock.advance(28.5)
    assert not other.hold(client.turn()), "the time counts from when it saw the last writing first"
    clock.advance(1.0)
    assert other.hold(client.turn())
    assert not holder.hold(client.turn())


def test_another_clock_does_not_matter(folder: dict[str, Any]) -> None:
    client = ObjectClient(**folder)
    ahead, behind = ManualClock(1e9), ManualClock(-1e9)
    holder, other = Lease(client, 60.0, behind), Lease(client, 10.0, ahead)
    assert holder.hold(client.turn())
    for _ in range(6):
        assert not other.hold(client.turn())
        ahead.advance(9.9)
    ahead.advance(1.0)
    assert other.hold(client.turn()), "after the time that the holder wrote, not after its own"


@pytest.mark.parametrize("line", [b"", b"what", b"kvstrata-lease 1 " + b"0" * 16 + b" 1 0\n"])
def test_a_lease_that_nobody_understands_goes(folder: dict[str, Any], line: bytes) -> None:
    clock, client = ManualClock(), ObjectClient(**folder)
    client.put(LEASE, [line], client.turn())
    lease = Lease(client, 60.0, clock)
    assert not lease.hold(client.turn())
    clock.advance(60.0)
    assert lease.hold(client.turn())


HOLDER = """
import sys, time
from kvstrata.tiers.object_store.tier import ObjectStoreTier

url, endpoint = sys.argv[1], sys.argv[2] or None
tier = ObjectStoreTier(url, endpoint=endpoint, capacity_bytes=1 << 30, lease_s=2.0, timeout_s=8.0)
while True:
    tier.upkeep()
    if tier.sweeps:
        print("sweeps", flush=True)
    time.sleep(0.2)
"""


def test_another_takes_over_from_a_node_that_was_killed(place: dict[str, Any], make: Make) -> None:
    tier = make(place, num_objects=5, lease_s=2.0)
    names = store(tier, 10)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, place["url"], place.get("endpoint", "")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"sweeps\n"
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            tier.upkeep()
            assert not tier.sweeps
            time.sleep(0.1)
    finally:
        holder.kill()
        holder.communicate()
    assert len(left(tier, names)) == 10, "the other's budget was larger"
    killed = time.monotonic()
    while not tier.sweeps:
        assert time.monotonic() < killed + 30
        tier.upkeep()
        time.sleep(0.1)
    assert time.monotonic() - killed > 1.0
    assert len(left(tier, names)) == 4


# what goes


def test_a_store_is_kept_to_its_budget(place: dict[str, Any], make: Make) -> None:
    tier, other = make(place, num_objects=20), make(place, num_objects=20)
    names = store(tier, 20)
    tier.upkeep()
    assert tier.sweeps
    assert len(left(other, names)) == 20, "as much as there may be"
    names += store(other, 5, first=20)
    other.upkeep()
    assert not other.sweeps
    assert len(left(other, names)) == 25
    tier.upkeep()
    assert len(left(other, names)) == 19, "95% of the budget"
    assert read_one(other, names[left(other, names)[0]], SIZE) == (HIT, bytes(filled(SIZE, 1)))


def test_what_was_used_longest_ago_goes_first(folder: dict[str, Any], make: Make) -> None:
    tier, other = make(folder, num_objects=6.4), make(folder)
    names = store(tier, 12)
    tier.touch([names[4]])
    tier.upkeep()  # which writes a note, and sweeps with it
    # The oldest are gone but for what was used; 6 of 6.4 are left.
    assert left(tier, names) == [4, 7, 8, 9, 10, 11]
    other.touch([names[7], names[4]])
    other.upkeep()
    tier.touch([names[8]])
    names += store(tier, 3, first=12)
    tier.upkeep()
    assert left(tier, names) == [4, 7, 8, 12, 13, 14]


def test_a_note_keeps_the_order_of_its_uses(folder: dict[str, Any], make: Make) -> None:
    tier = make(folder, num_objects=3.2)
    names = store(tier, 6)
    order = [3, 0, 5, 1, 4, 2]
    tier.touch([names[i] for i in order])
    tier.upkeep()
    assert left(tier, names) == sorted(order[-3:])


def test_two_upkeeps_at_once(folder: dict[str, Any], make: Make) -> None:
    tier = make(folder, num_objects=4)
    names, start = store(tier, 30), threading.Barrier(4)

    def keep(_: int) -> None:
        start.wait()
        tier.upkeep()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(keep, range(4)))
    assert left(tier, names) == [27, 28, 29]


def test_what_is_of_a_past_epoch_goes_first(place: dict[str, Any], make: Make) -> None:
    tier, other = make(place, num_objects=10), make(place, num_objects=10)
    old = store(tier, 8)
    other.begin_epoch()
    new = store(other, 9)
    tier.upkeep()
    assert left(tier, old) == []
    assert left(tier, new) == list(range(9)), "what is of the past is not held against them"


def test_what_came_with_a_new_epoch_is_no_past(folder: dict[str, Any], make: Make) -> None:
    """A clear while a pass is under way: what the others store since is not of its epoch."""
    tier, client = make(folder), ObjectClient(**folder)
    old, seen = tier.epoch().number, list[int]()

    def present(turn: Turn) -> int:
        if not seen:
            seen.append(old)
            tier.begin_epoch()
            store(tier, 3)
            return old
        return tier.epoch().number

    sweep = Sweep(client, 1 << 40, present, Lease(client), every_s=0.0)
    sweep.step(client.turn())
    assert sweep.num_passes == 1
    names = [name(i, tier.epoch().number) for i in range(3)]
    assert left(tier, names) == [0, 1, 2]


def test_what_is_not_ours_stays_and_does_not_count(place: dict[str, Any], make: Make) -> None:
    tier, client = make(place, num_objects=4), ObjectClient(**place)
    foreign = ["readme", f"{1:016x}/readme", f"{1:016x}/{2:016x}/read-me", "models/a/b"]
    for path in foreign:
        client.put(path, [bytes(10 * SIZE)], client.turn())
    names = store(tier, 4)
    tier.upkeep()
    assert left(tier, names) == [0, 1, 2, 3]
    assert all(client.head(path, client.turn()) is not None for path in foreign)


class _Steps(Turn):
    """A turn that has time for so many steps."""

    def __init__(self, count: int) -> None:
        super().__init__(1e9)
        self._count = count

    @property
    def left(self) -> bool:
        self._count -= 1
        return self._count >= 0


def test_a_call_does_a_part_of_the_work(folder: dict[str, Any], make: Make) -> None:
    tier, client = make(folder), ObjectClient(**folder)
    epoch = tier.epoch().number
    names = store(tier, 600)
    sweep = Sweep(client, SIZE, lambda turn: epoch, Lease(client), every_s=0.0)
    counts = []
    while not sweep.num_passes:
        sweep.step(_Steps(1))
        counts.append(sum(len(left(tier, names[i : i + 60])) for i in range(0, 600, 60)))
    assert max(before - after for before, after in itertools.pairwise(counts)) == 256
    assert counts[-1] == 0
    assert len(counts) > 5


def test_what_a_pass_remembers_is_bounded(
    folder: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.tiers.object_store.sweep.MAX_VICTIMS", 5)
    tier = make(folder, num_objects=2.2)
    names = store(tier, 12)
    tier.upkeep()
    assert left(tier, names) == [5, 6, 7, 8, 9, 10, 11], "the oldest five are gone"
    for _ in range(3):
        tier.upkeep()
    assert left(tier, names) == [10, 11]


def test_a_node_that_may_not_sweep_leaves_it_to_others(
    server: SeaweedFS,
    tmp_path: Path,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = {"url": f"s3://{BUCKET}/{tmp_path.name}-r", "endpoint": server.endpoint}
    clock, node = ManualClock(), make(place, num_objects=4)
    names = store(node, 8)
    let_in(monkeypatch, READER_KEY)
    reader = make(place, num_objects=4, clock=clock)
    for _ in range(3):
        reader.upkeep()
    assert not reader.sweeps
    told = [record for record in caplog.records if "cannot sweep" in record.getMessage()]
    assert len(told) == 1, "said once"
    assert "check AWS_ACCESS_KEY_ID" in told[0].getMessage()
    assert read_one(reader, names[0], SIZE)[0] is HIT
    node.upkeep()
    assert len(left(reader, names)) == 3
    clock.advance(600.0)
    reader.upkeep()


def test_what_a_dead_writer_left_in_a_folder_goes(
    folder: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    tier = make(folder)
    (names,) = [store(tier, 1)]
    (shard,) = [file.parent for file in tmp_path.rglob("*") if len(file.name) > 50]
    old, young, foreign = shard / "ab#1", shard / "cd#2", shard / "read#me"
    for file in (old, young, foreign):
        file.write_bytes(b"x")
    for file in (old, foreign):
        os.utime(file, (1.0, 1.0))
    tier.upkeep()  # the first has only now learnt the folder's time
    tier.upkeep()
    assert (old.exists(), young.exists(), foreign.exists()) == (False, True, True)
    assert left(tier, names) == [0]


# notes of uses


def test_notes() -> None:
    names = [bytes([i]) * (i + 1) for i in range(64)]
    assert decode_note(encode_note(names)) == names
    assert decode_note(encode_note([])) == []
    for damaged in (b"", b"else", encode_note(names)[:-1], encode_note([b"a"]) + b"\0",
                    encode_note([]) + bytes([65]) + bytes(65)):  # fmt: skip
        with pytest.raises(CorruptObject):
            decode_note(damaged)


def test_a_note_is_written_when_it_is_due(
    folder: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.tiers.object_store.uses.MAX_NOTED", 4)
    clock, client = ManualClock(), ObjectClient(**folder)

    def written() -> list[list[bytes]]:
        paths = [one.path for batch in client.listing(USES) for one in batch]
        found = [client.small(path, client.turn()) for path in sorted(paths)]
        return [decode_note(one[0]) for one in found if one is not None]

    notes = Notes(client, 600.0, clock)
    notes.write(client.turn())
    notes.note([b"a", b"b", b"a"])
    clock.advance(599.0)
    notes.write(client.turn())
    assert written() == []
    clock.advance(1.0)
    notes.write(client.turn())
    notes.write(client.turn())
    assert written() == [[b"b", b"a"]]
    notes.note([bytes([i]) for i in range(20)])
    notes.write(client.turn())
    assert written() == [[b"b", b"a"], [bytes([i]) for i in range(16, 20)]]


def test_old_notes_go_and_damaged_ones_do_no_harm(folder: dict[str, Any]) -> None:
    client = ObjectClient(**folder)
    Notes(client, -1.0).write(client.turn())  # nothing was used: no note
    client.put(f"{USES}/damaged", [b"what"], client.turn())
    notes = Notes(client, 0.0)
    notes.note([b"a"])
    notes.write(client.turn())
    uses, now_s = LastUses(client), time.time()
    list(uses.gather(now_s, client.turn))
    assert abs(uses.of(b"a") - now_s) < 60
    assert uses.of(b"b") == 0.0
    list(uses.gather(now_s + KEEP_S + 61, client.turn))
    assert uses.of(b"a") == 0.0
    assert [one for batch in client.listing(USES) for one in batch] == []


def test_uses_that_are_remembered_are_bounded(
    folder: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.tiers.object_store.uses.MAX_REMEMBERED", 10)
    client = ObjectClient(**folder)
    notes, uses = Notes(client, 0.0), LastUses(client)
    for start in range(0, 24, 8):
        notes.note([bytes([i]) for i in range(start, start + 8)])
        notes.write(client.turn())
        time.sleep(0.01)
    list(uses.gather(time.time(), client.turn))
    known = [i for i in range(24) if uses.of(bytes([i]))]
    assert len(known) <= 10
    assert set(range(19, 24)) <= set(known)


def test_a_tier_without_uses_leaves_no_notes(folder: dict[str, Any], make: Make) -> None:
    tier, client = make(folder), ObjectClient(**folder)
    tier.upkeep()
    assert [one for batch in client.listing(USES) for one in batch] == []
    tier.touch([name(1)])
    tier.upkeep()
    tier.upkeep()
    assert len([one for batch in client.listing(USES) for one in batch]) == 1
    assert tier.stat([name(1)]) == [MISS]
