"""Clears by tenant, namespace and age: what a scan finds, what a crash leaves, what is damaged."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.nodes import (
    NAMESPACE,
    SLOT,
    GatedTier,
    arrive,
    chunk_keys,
    clear,
    flush,
    load,
    match,
    on_node,
    owned,
    release,
    until,
)
from tests.unit.test_owners import (
    ANNA,
    BERT,
    Lasting,
    answer,
    client,
    held,
    keep,
    pin,
    run,
    there,
    with_tier,
)

from kvstrata.errors import TierUnavailable, UsageError
from kvstrata.header import NOBODY
from kvstrata.node.node import Node
from kvstrata.node.operating.pinning import MAX_CHUNKS_OF_OWNER
from kvstrata.node.service.ages import EVERY_NS, MAX_DATES, Ages
from kvstrata.node.service.ledger import SPARE_BYTES, Ledger, Marked, Pin, Quota, Unpin
from kvstrata.node.service.scrub import scrub
from kvstrata.tiers import journal as journals
from kvstrata.tiers.base import Epoch
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.tiers.epochs import decode_epoch, encode_epoch, marked
from kvstrata.tiers.faulty import FaultyTier, Raise
from kvstrata.tiers.journal import FileJournal, Journal
from kvstrata.tiers.marks import MARGIN_NS, MAX_IN_EPOCH, MAX_MARKS, UNKNOWN, Mark, Marks, Whose
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p

OTHER = bytes(reversed(NAMESPACE))
NOW = 10**18

owners = st.sampled_from([b"", ANNA, BERT])
namespaces = st.sampled_from([b"", NAMESPACE, OTHER])
marks_ = st.builds(Mark, owners, namespaces, st.integers(0, 5).map(lambda n: n * MARGIN_NS))
whoses = st.builds(Whose, st.sampled_from([ANNA, BERT]), st.sampled_from([NAMESPACE, OTHER]))


class LateTier(GatedTier):
    """A tier whose reads can be kept from coming back after they have read."""

    def __init__(self) -> None:
        super().__init__()
        self.late = threading.Event()
        self.late.set()

    def read(self, ids: Any, into: Any) -> Any:
        lengths = super().read(ids, into)
        self.waiting += 1
        assert self.late.wait(30)
        self.waiting -= 1
        return lengths


class TestMarks:
    @given(st.lists(marks_, max_size=8), whoses, st.integers(0, 8 * MARGIN_NS))
    def test_covered_is_what_any_of_them_covers(
        self, many: list[Mark], whose: Whose, created_ns: int
    ) -> None:
        marks = Marks(many)
        expected = any(
            mark.owner in (b"", whose.owner)
            and mark.namespace in (b"", whose.namespace)
            and created_ns < mark.before_ns + MARGIN_NS
            for mark in many
        )
        assert marks.covers(whose, created_ns) == expected
        assert not marks.covers(whose, marks.date(whose, created_ns)), "dated behind them"
        assert marks.date(whose, created_ns) == created_ns or expected
        epoch = decode_epoch(encode_epoch(Epoch(7, 5.0, tuple(marks))), "here")
        assert epoch == Epoch(7, 5.0, tuple(marks))

    def test_what_is_nobodys_may_be_anybodys(self) -> None:
        assert Marks([Mark(ANNA, b"", NOW)]).covers(Whose(NOBODY, NAMESPACE), NOW)
        assert not Marks([Mark(ANNA, b"", NOW)]).covers(Whose(BERT, NAMESPACE), NOW)

    def test_there_are_never_many_and_none_is_lost(self) -> None:
        marks = Marks()
        all_owners = [number.to_bytes(16, "big") for number in range(1, 3 * MAX_MARKS)]
        for number, owner in enumerate(all_owners):
            marks.add(Mark(owner, NAMESPACE, NOW + number))
            assert len(marks) <= MAX_MARKS
        for number, owner in enumerate(all_owners):
            assert marks.covers(Whose(owner, NAMESPACE), NOW + number + MARGIN_NS - 1)
        assert not marks.covers(Whose(ANNA, OTHER), NOW), "another namespace is let be"
        last = NOW + len(all_owners) - 1
        assert not marks.covers(Whose(all_owners[-1], NAMESPACE), last + MARGIN_NS)

    def test_one_that_was_renewed_is_not_forgotten(self) -> None:
        marks = Marks([Mark(ANNA, b"", 1), Mark(BERT, b"", 1)])
        before = list(marks)
        marks.add(Mark(ANNA, b"", 2))
        marks.forget(before)
        assert list(marks) == [Mark(ANNA, b"", 2)]

    @pytest.mark.parametrize(
        "lines",
        [
            b"mark",
            b"mark 1 - -",
            b"mark 01 - -\n",
            b"mark 1 aa -\n",
            b"mark 1 - -\nx",
            b"mark 1 - -\n" * (MAX_IN_EPOCH + 1),
        ],
    )
    def test_an_epoch_with_anything_else_is_none(self, lines: bytes) -> None:
        with pytest.raises(TierUnavailable, match="no epoch of this release"):
            decode_epoch(encode_epoch(Epoch(7, 5.0)) + lines, "here")

    def test_an_epoch_with_marks_fits_where_it_is_kept(self) -> None:
        epoch = Epoch(7, 5.0)
        for number in range(200):
            epoch = marked(epoch, Mark(bytes([number]) * 16, os.urandom(32), NOW))
        assert len(epoch.marks) <= MAX_IN_EPOCH
        assert decode_epoch(encode_epoch(epoch), "here") == epoch

    def test_ages_are_few_and_never_too_old(self) -> None:
        ages, step = Ages(), EVERY_NS // 3
        count = 4 * MAX_DATES
        for generation in range(count):
            ages.note(generation, generation * step)
        assert len(ages._dates_ns) <= MAX_DATES
        for generation in range(0, count, 7):
            assert not ages.surely_before(generation, generation * step)
        assert ages.surely_before(count // 2, count // 2 * step + 2 * EVERY_NS)
        assert not ages.surely_before(count - 1, 10**30), "of the last ones nobody knows yet"


class TestClears:
    @pytest.mark.parametrize(
        ("fields", "left"),
        [
            ((ANNA, b""), [1]),
            ((b"", NAMESPACE), [2]),
            ((ANNA, NAMESPACE), [1, 2]),
            ((BERT, OTHER), [0, 1, 2]),
        ],
    )
    def test_what_fits_goes_and_nothing_else(
        self, fields: tuple[bytes, bytes], left: list[int]
    ) -> None:
        async def test(node: Node) -> None:
            prompts = [chunk_keys(3, number) for number in range(3)]
            keep(node, prompts[0], ANNA)
            keep(node, prompts[1], BERT)
            keep(node, prompts[2], ANNA, namespace=OTHER)
            await flush(node, client())
            done = await answer(node, p.Clear(1, None, [], *fields))
            assert done.count == 6 * (3 - len(left))
            for tier in (0, 1):
                found = [number for number in range(3) if there(node, prompts[number], tier)]
                assert found == left
            for number in left:
                assert await load(node, client(), prompts[number]) == 3

        on_node(test, slots=20, tier=GatedTier())

    def test_what_is_stored_after_it_is_served_from_every_tier(self) -> None:
        tier = Lasting()

        async def test(node: Node) -> None:
            keys = chunk_keys(3)
            keep(node, keys, ANNA)
            await flush(node, client())
            await answer(node, p.Clear(1, None, [], ANNA))
            assert keep(node, keys, ANNA) == 3
            await flush(node, client())
            await clear(node, client(), None, ["host"])
            assert await load(node, client(), keys) == 3

        async def later(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            assert len(node.backings[0].marks) == 1
            assert await load(node, client(), chunk_keys(3)) == 3

        run(with_tier(tier), test)
        run(with_tier(tier), later)

    def test_in_one_tier_the_other_keeps_it(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(2)
            keep(node, keys, ANNA)
            await flush(node, client())
            await answer(node, p.Clear(1, None, ["memory"], ANNA))
            assert (there(node, keys), there(node, keys, 1)) == ([0, 1], [])
            keep(node, chunk_keys(2, 1), ANNA)
            await flush(node, client())
            await answer(node, p.Clear(1, None, ["host"], ANNA))
            assert (there(node, keys), there(node, chunk_keys(2, 1), 1)) == ([], [0, 1])

        on_node(test, tier=GatedTier())

    def test_what_is_being_written_is_dropped(self) -> None:
        tier = GatedTier()

        async def test(node: Node) -> None:
            keys, others = chunk_keys(2), chunk_keys(2, 1)
            tier.shut("write")
            keep(node, keys, ANNA)
            keep(node, others, BERT)
            await until(lambda: tier.waiting > 0)
            clearing = asyncio.ensure_future(answer(node, p.Clear(1, None, [], ANNA)))
            await asyncio.sleep(0)
            tier.open()
            await clearing
            await flush(node, client())
            assert (there(node, keys, 1), there(node, others, 1)) == ([], [0, 1])

        on_node(test, tier=tier)

    def test_what_a_scan_found_is_a_miss(self) -> None:
        tier, keys, others = Lasting(), chunk_keys(3), chunk_keys(3, 1)

        async def first(node: Node) -> None:
            keep(node, keys, ANNA)
            keep(node, others, BERT)
            await flush(node, client())

        async def second(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            assert there(node, keys, 1) == [0, 1, 2]
            await answer(node, p.Clear(1, None, [], ANNA))
            assert await load(node, client(), keys) == 0
            assert await load(node, client(), others) == 3
            # It is gone, and nothing stands in the way of a fresh copy.
            assert keep(node, keys, ANNA) == 3
            await flush(node, client())
            assert there(node, keys, 1) == [0, 1, 2]

        run(with_tier(tier), first)
        run(with_tier(tier), second)

    def test_a_node_that_dies_in_between_has_cleared_all_the_same(self, tmp_path: Path) -> None:
        keys = chunk_keys(3)

        async def first(node: Node) -> None:
            keep(node, keys, ANNA)
            await flush(node, client())

        async def second(node: Node) -> None:
            tier = node.backings[0].tier
            assert isinstance(tier, FaultyTier)
            tier.inject("delete", Raise(TierUnavailable("the machine has died")))
            await until(lambda: node.backings[0].state == "ok")
            assert await load(node, client(), keys[:1]) == 1
            await answer(node, p.Clear(1, None, [], ANNA))

        async def third(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            assert there(node, keys, 1) == [0, 1, 2], "the files are there"
            assert await load(node, client(), keys) == 0

        run(with_tier(DiskTier(tmp_path / "d")), first)
        faulty = FaultyTier(DiskTier(tmp_path / "d"))
        run(with_tier(faulty), second)
        run(with_tier(DiskTier(tmp_path / "d")), third)

    def test_by_age(self) -> None:
        async def test(node: Node) -> None:
            keys = chunk_keys(2)
            keep(node, keys, ANNA)
            await flush(node, client())
            now = time.time_ns()
            await answer(node, p.Clear(1, None, [], ANNA, b"", now - 2 * MARGIN_NS))
            assert await load(node, client(), keys) == 2
            await answer(node, p.Clear(1, None, [], b"", b"", now))
            assert there(node, keys) == []
            assert await load(node, client(), keys) == 0
            await until(lambda: 0 not in there(node, keys, 1))  # read, and found to be too old

        on_node(test, tier=GatedTier())

    def test_keys_with_an_owner(self) -> None:
        async def test(node: Node) -> None:
            keys, others = chunk_keys(2), chunk_keys(2, 1)
            keep(node, keys, ANNA)
            keep(node, others, BERT)
            await flush(node, client())
            both = b"".join([*keys, *others])
            assert (await answer(node, p.Clear(1, both, [], BERT))).count == 4
            assert (there(node, keys), there(node, others)) == ([0, 1], [])

        on_node(test, tier=GatedTier())

    def test_marks_go_when_a_scrub_has_read_everything(self, monkeypatch: Any) -> None:
        tier, keys = Lasting(), chunk_keys(3)

        async def first(node: Node) -> None:
            keep(node, keys, ANNA)
            keep(node, chunk_keys(2, 1), BERT)
            await flush(node, client())

        async def second(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            await answer(node, p.Clear(1, None, [], ANNA))
            backing = owned(node)
            assert there(node, keys, 1) == [0, 1, 2]
            backing.scrub_bytes_per_s = 1e12
            work = asyncio.ensure_future(scrub(backing))
            try:
                await until(lambda: not len(backing.marks))
            finally:
                work.cancel()
            assert (there(node, keys, 1), held(node, BERT, 1)) == ([], 2)
            await backing.upkeep()
            assert tier.journal.lines() == []

        monkeypatch.setattr("kvstrata.node.service.scrub.IDLE_S", 0.01)
        run(with_tier(tier), first)
        run(with_tier(tier), second)

    @pytest.mark.parametrize("motion", ["write", "read", "copy"])
    def test_a_mark_stays_while_something_older_is_under_way(
        self, motion: str, monkeypatch: Any
    ) -> None:
        tier, keys = LateTier(), chunk_keys(1)  # the tier has a thread left for its notes

        async def test(node: Node) -> None:
            backing, me = owned(node), client()
            await until(lambda: backing.state == "ok")
            if motion == "write":
                tier.shut("write")
            keep(node, keys, ANNA)
            lease = 0
            if motion != "write":
                await flush(node, me)
            if motion == "read":
                await clear(node, me, keys, ["host"])
                tier.late.clear()
                lease = match(node, me, keys).lease
            if motion == "copy":
                await clear(node, me, keys, ["memory"])
                tier.shut("write")
                await answer(node, o.Copy(2, b"".join(keys), "host", "memory"))
            await until(lambda: tier.waiting > 0)
            await answer(node, p.Clear(1, None, [], ANNA))
            scrubbing = asyncio.ensure_future(scrub(backing))
            try:
                await asyncio.sleep(0.1)
                assert len(backing.marks) == 1
                tier.open()
                tier.late.set()
                await flush(node, me)
                await until(lambda: not (node.operations.jobs.running or tier.waiting))
                if lease:
                    await arrive(node, me, lease)
                    release(node, me, lease)
                await until(lambda: not len(backing.marks))
            finally:
                scrubbing.cancel()
            assert (there(node, keys), there(node, keys, 1)) == ([], [])

        monkeypatch.setattr("kvstrata.node.service.scrub.IDLE_S", 0.01)
        node = with_tier(tier)
        owned(node).scrub_bytes_per_s = 1e12
        run(node, test)

    def test_who_is_known_to_have_nothing_leaves_no_mark(self, monkeypatch: Any) -> None:
        tier, keys = Lasting(), chunk_keys(2)
        monkeypatch.setattr("kvstrata.node.service.scrub.IDLE_S", 0.01)

        async def first(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            keep(node, keys, BERT)
            await flush(node, client())
            await answer(node, p.Clear(1, None, [], ANNA))
            await answer(node, p.Clear(1, None, [], b"", OTHER))
            assert len(owned(node).marks) == 0
            await answer(node, p.Clear(1, None, [], BERT))
            assert len(owned(node).marks) == 1
            keep(node, keys, BERT)
            await flush(node, client())

        async def second(node: Node) -> None:
            backing = owned(node)
            await until(lambda: backing.state == "ok")
            await answer(node, p.Clear(1, None, [], ANNA))
            assert len(backing.marks) == 2, "nobody has read yet whose it is"
            backing.scrub_bytes_per_s = 1e12
            scrubbing = asyncio.ensure_future(scrub(backing))
            try:
                await until(lambda: not len(backing.marks))
            finally:
                scrubbing.cancel()
            await answer(node, p.Clear(1, None, [], ANNA))
            assert len(backing.marks) == 0
            assert there(node, keys, 1) == [0, 1]

        run(with_tier(tier), first)
        run(with_tier(tier), second)

    def test_many_of_them_clear_nobody_elses(self) -> None:
        tier, keys = Lasting(), chunk_keys(2)

        async def first(node: Node) -> None:
            keep(node, keys, BERT)
            await flush(node, client())

        async def second(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            for number in range(1, 200):
                await answer(node, p.Clear(1, None, [], bytes([number]) * 8 + bytes(8)))
            assert await load(node, client(), keys) == 2

        run(with_tier(tier), first)
        run(with_tier(tier), second)

    def test_marks_go_with_a_clear_of_everything(self) -> None:
        async def test(node: Node) -> None:
            await answer(node, p.Clear(1, None, [], ANNA))
            await clear(node, client())
            assert len(node.backings[0].marks) == 0

        on_node(test, tier=GatedTier())

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ((b"a", b"", 0), "an owner of 1 bytes"),
            ((b"", b"n", 0), "a namespace of 1 bytes"),
            ((b"", b"", -1), "no time until now"),
            ((b"", b"", 1 << 62), "no time until now"),
        ],
    )
    def test_refused(self, fields: tuple[bytes, bytes, int], says: str) -> None:
        async def test(node: Node) -> None:
            with pytest.raises(UsageError, match=says):
                await answer(node, p.Clear(1, None, [], *fields))

        on_node(test)

    def test_pins_end_that_only_a_read_found_to_be_cleared(self) -> None:
        tier, keys = Lasting(), chunk_keys(2)

        async def first(node: Node) -> None:
            keep(node, keys, ANNA)
            await flush(node, client())
            await pin(node, keys)

        async def second(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            assert len(node.tenants.pinning) == 1
            await answer(node, p.Clear(1, None, [], b"", NAMESPACE))
            assert await load(node, client(), keys) == 0
            assert await load(node, client(), keys[1:]) == 0
            await until(lambda: not there(node, keys, 1))
            await node.tenants.pinning.expire()
            assert len(node.tenants.pinning) == 0

        run(with_tier(tier), first)
        run(with_tier(tier), second)


class TestJournal:
    def test_lines_outlive_it_and_a_torn_end_does_not(self, tmp_path: Path) -> None:
        path = tmp_path / "journal"
        FileJournal(str(path)).append([b"one", b"two"])
        whole = path.read_bytes()
        for cut in range(len(whole)):
            path.write_bytes(whole[:cut])
            journal = FileJournal(str(path))
            assert not journal.damaged
            assert journal.lines() == [b"one", b"two"][: whole[:cut].count(b"\n")]
            journal.append([b"three"])
            assert FileJournal(str(path)).lines() == [*journal.lines()]
            assert FileJournal(str(path)).lines()[-1] == b"three"

    def test_any_other_damage_is_seen(self, tmp_path: Path) -> None:
        path = tmp_path / "journal"
        FileJournal(str(path)).append([b"one", b"two"])
        whole = path.read_bytes()
        for place in range(len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            journal = FileJournal(str(path))
            assert journal.damaged
            assert set(journal.lines()) < {b"one", b"two"}

    def test_what_cannot_be_appended_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, write = tmp_path / "journal", os.write
        journal = FileJournal(str(path))
        journal.append([b"one"])

        def short(fd: int, data: Any) -> int:
            if len(data) > 10:
                return write(fd, data[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", short)
        with pytest.raises(TierUnavailable, match="No space left"):
            journal.append([b"x" * 14])
        monkeypatch.undo()
        journal.append([b"two"])
        assert FileJournal(str(path)).lines() == [b"one", b"two"]

    def test_a_damaged_one_clears_the_tier(self, tmp_path: Path) -> None:
        keys = chunk_keys(2)

        async def first(node: Node) -> None:
            keep(node, keys, BERT)
            await flush(node, client())
            await answer(node, p.Clear(1, None, [], ANNA))
            await answer(node, p.Quota(1, ANNA, "disk", 5 * SLOT))

        async def second(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            assert there(node, keys, 1) == []
            await owned(node).save()

        run(with_tier(DiskTier(tmp_path / "d")), first)
        file = tmp_path / "d" / "journal"
        file.write_bytes(b"x" + file.read_bytes()[1:])
        run(with_tier(DiskTier(tmp_path / "d")), second)

    def test_it_is_made_anew_when_most_of_it_has_passed(self) -> None:
        journal = Journal()
        ledger = Ledger(journal)
        for number in range(1000):
            pinned = Pin(ANNA, f"{number}", bytes(32), 1.0)
            ledger.note(pinned)
            ledger.note(Unpin(*pinned.id))
            ledger.note(Quota(BERT, number))
            ledger.saving()()
            ledger.was_saved()
        ledger.note(Marked(ANNA, b"", 5))
        ledger.saving()()
        assert len(journal.lines()) < 300
        again = Ledger(journal)
        assert (again.quotas, again.pins, list(again.marks)) == (
            {BERT: 999}, {}, [Mark(ANNA, b"", 5)]
        )  # fmt: skip

    @pytest.mark.parametrize("saves", [1, 10_000])
    def test_it_is_made_anew_long_before_it_is_too_large(self, saves: int, tmp_path: Path) -> None:
        path, keys = str(tmp_path / "journal"), bytes(32 * MAX_CHUNKS_OF_OWNER)
        journal = FileJournal(path)
        ledger = Ledger(journal)
        for number in range(40):  # each of them fits, and they are renewed for ever
            ledger.note(Pin(ANNA, "all", keys, float(number)))
            if number % saves == saves - 1 or number == 39:
                ledger.saving()()
                ledger.was_saved()
            assert journal.nbytes == (os.path.getsize(path) if os.path.exists(path) else 0)
            assert journal.nbytes <= SPARE_BYTES
        again = Ledger(FileJournal(path))
        assert not again.damaged
        assert [pin.until_s for pin in again.pins.values()] == [39.0]

    def test_nothing_is_written_that_would_not_be_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = str(tmp_path / "journal")
        monkeypatch.setattr(journals, "MAX_JOURNAL_BYTES", 100)
        for journal in (Journal(), FileJournal(path)):
            journal.append([b"x" * 40])
            with pytest.raises(TierUnavailable, match="116 bytes; 100 at most"):
                journal.append([b"y" * 40])
            with pytest.raises(TierUnavailable, match="118 bytes; 100 at most"):
                journal.replace([b"y" * 100])
            assert journal.lines() == [b"x" * 40]
        assert FileJournal(path).lines() == [b"x" * 40]
        ledger = Ledger(Journal())
        with pytest.raises(UsageError, match=r"a pin of \d+ bytes"):
            ledger.note(Pin(ANNA, "all", bytes(4 << 20), 1.0))
        assert ledger.saved

    @given(
        st.lists(
            st.one_of(
                st.builds(Marked, owners, namespaces, st.integers(0, 9)),
                st.builds(Quota, st.sampled_from([ANNA, BERT]), st.none() | st.integers(0, 9)),
                st.builds(
                    Pin,
                    st.sampled_from([ANNA, BERT]),
                    st.sampled_from("ab"),
                    st.just(bytes(32)),
                    st.floats(0, 1),
                ),
                st.builds(Unpin, st.sampled_from([ANNA, BERT]), st.sampled_from("ab")),
                st.sampled_from(["save", "fail", "open"]),
            )
        )
    )
    def test_what_was_saved_is_there_again(self, steps: Sequence[Any]) -> None:
        journal = Journal()
        ledger = Ledger(journal)
        for step in [*steps, "save", "open"]:
            if step == "save":
                ledger.saving()()
                ledger.was_saved()
            elif step == "fail":
                ledger.saving()
            elif step == "open" and ledger.saved:
                again = Ledger(journal)
                assert (again.quotas, again.pins) == (ledger.quotas, ledger.pins)
                assert set(again.marks) == set(ledger.marks)
                ledger = again
            elif not isinstance(step, str):
                ledger.note(step)

    def test_a_line_of_something_else_counts_as_damage(self) -> None:
        journal = Journal()
        journal.append([b"[]"])
        assert Ledger(journal).damaged
        assert Whose(b"", b"") == UNKNOWN
