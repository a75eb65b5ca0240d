"""The contract of shared tiers, as a class of tests to subclass, with a real server under it.

::

    class TestMine(SharedTierContract):
        def start_server(self, folder):
            return MyServer(folder)

        def make_tier(self, server, place):
            return MyTier(server.address, place)
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import TierUnavailable
from kvstrata.testing.ground import Ground, Server
from kvstrata.testing.stores import (
    FAILED,
    HISTORY,
    HIT,
    MISS,
    PAGE,
    STORE_ACTIONS,
    StoreContract,
    empty,
    filled,
    has,
    object_id,
    outcomes,
    put,
    read_one,
    step,
    write,
)
from kvstrata.tiers.base import MAX_NAME_BYTES, SharedTier, Store
from kvstrata.tiers.epochs import epoch_prefix
from kvstrata.tiers.marks import Mark

MARGIN_S = 3.0
"""What a call may take beyond its tier's own limit on a machine that is busy."""

_places = itertools.count()


def name(number: int, epoch: int = 1) -> bytes:
    """A name as a node makes them, as long as names may be."""
    return epoch_prefix(epoch) + object_id(number).ljust(MAX_NAME_BYTES - 8, b"\xff")


class SharedStoreContract(StoreContract):
    """The contract without the faults of a server, for a tier that has none: see below."""

    server: Any

    def start_server(self, folder: Path) -> Ground:
        """A server of its own, or what is in its place."""
        raise NotImplementedError("a subclass says what is under test")

    def make_tier(self, server: Any, place: str) -> SharedTier:
        """A client of its own, of the objects under ``place``: its epoch, its names.

        Args:
            server: as `start_server` made it.
            place: letters, digits and hyphens; two tiers with one place are one store.
        """
        raise NotImplementedError("a subclass says what is under test")

    def make_store(self, folder: Path) -> Store:
        return self.make_tier(self.server, self.new_place())

    def new_place(self) -> str:
        """A place where nothing is."""
        return f"place-{next(_places)}"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        cls.server = cls().start_server(tmp_path_factory.mktemp("server"))
        yield
        cls.server.close()

    @pytest.fixture
    def place(self) -> str:
        return self.new_place()

    @pytest.fixture
    def tier(self, place: str) -> Iterator[SharedTier]:
        tier = self.make_tier(self.server, place)
        yield tier
        tier.close()

    @pytest.fixture
    def other(self, place: str) -> Iterator[SharedTier]:
        """Another node's client of the same objects."""
        tier = self.make_tier(self.server, place)
        yield tier
        tier.close()

    # one store, many who use it

    def test_what_one_stores_another_finds(self, tier: SharedTier, other: SharedTier) -> None:
        data = filled(5 * PAGE, 1)
        assert write(tier, [(name(1), data)]) == [HIT]
        assert has(other, [name(1), name(2)]) == [HIT, MISS]
        assert read_one(other, name(1), 5 * PAGE) == (HIT, bytes(data))
        assert other.write([put(name(1), filled(PAGE, 2), True)]) == [MISS]
        assert other.delete([name(1)]) == [HIT]
        assert has(tier, [name(1)]) == [MISS]

    def test_places_are_apart(self, tier: SharedTier) -> None:
        elsewhere = self.make_tier(self.server, self.new_place())
        write(tier, [(name(1), filled(PAGE, 1))])
        assert has(elsewhere, [name(1)]) == [MISS]
        before = elsewhere.epoch()
        assert tier.begin_epoch() != before
        assert elsewhere.epoch() == before
        elsewhere.close()

    def test_names_of_all_lengths(self, tier: SharedTier) -> None:
        names = [name(1)[:length] for length in range(8 + 36, MAX_NAME_BYTES + 1)]
        write(tier, [(one, filled(PAGE, i)) for i, one in enumerate(names)])
        for i, one in enumerate(names):
            assert read_one(tier, one, PAGE) == (HIT, bytes(filled(PAGE, i)))

    def test_a_batch_that_takes_several_rounds(self, tier: SharedTier) -> None:
        count = min(tier.limits.batch_objects, 3 * tier.limits.round_objects, 200)
        names = [name(i) for i in range(count)]
        for one in names[::2]:
            write(tier, [(one, filled(PAGE, 1))])
        assert has(tier, names) == [HIT if i % 2 == 0 else MISS for i in range(count)]

    # epochs

    def test_an_epoch_is_there_from_the_start(self, tier: SharedTier, other: SharedTier) -> None:
        epoch = tier.epoch()
        assert tier.epoch() == other.epoch() == epoch
        assert 0 <= epoch.number < 1 << 64
        assert epoch.lasts_s > 0

    def test_who_asks_first_begins_it_for_all(self, place: str) -> None:
        tiers, start = [self.make_tier(self.server, place) for _ in range(4)], threading.Barrier(4)

        def ask(tier: SharedTier) -> object:
            start.wait()
            return tier.epoch()

        with ThreadPoolExecutor(4) as threads:
            assert len(set(threads.map(ask, tiers))) == 1
        for tier in tiers:
            tier.close()

    def test_a_new_epoch_is_like_no_other(self, tier: SharedTier, other: SharedTier) -> None:
        seen = [tier.epoch()]
        for one in (tier, other, tier, other):
            begun = one.begin_epoch()
            assert begun.lasts_s == seen[0].lasts_s
            assert tier.epoch() == other.epoch() == begun
            seen.append(begun)
        assert len({epoch.number for epoch in seen}) == len(seen)

    def test_marks_are_for_all_and_end_with_the_epoch(
        self, tier: SharedTier, other: SharedTier
    ) -> None:
        for number, one in enumerate((tier, other, tier), 1):
            before, mark = tier.epoch(), Mark(bytes([number]) * 16, b"", number)
            after = one.add_mark(mark)
            assert after.lasts_s == before.lasts_s
            if after.number == before.number:  # or else everything was cleared
                assert set(after.marks) == {*before.marks, mark}
            assert tier.epoch() == other.epoch() == after
        assert tier.begin_epoch().marks == other.epoch().marks == ()

    def test_no_mark_is_lost_where_several_make_some_at_once(
        self, tier: SharedTier, other: SharedTier
    ) -> None:
        before = tier.epoch()
        marks = [Mark(bytes([number]) * 16, b"", number) for number in range(1, 9)]
        with ThreadPoolExecutor(len(marks)) as threads:
            answers = [
                threads.submit(one.add_mark, mark)
                for one, mark in zip(itertools.cycle((tier, other)), marks, strict=False)
            ]
            for mark, answer in zip(marks, answers, strict=True):
                after = answer.result()
                assert after.number != before.number or mark in after.marks
        after = other.epoch()
        assert after.number != before.number or set(after.marks) == set(marks)

    def test_the_epoch_is_no_object(self, tier: SharedTier, other: SharedTier) -> None:
        epoch = tier.epoch()
        for number in (epoch.number, 0, (1 << 64) - 1):
            assert tier.forget(number) == 0
        assert other.epoch() == epoch

    def test_forget(self, tier: SharedTier, other: SharedTier) -> None:
        old, new = tier.epoch().number, tier.begin_epoch().number
        names = [name(i, epoch) for epoch in (old, new) for i in range(30)]
        write(tier, [(one, filled(PAGE, i)) for i, one in enumerate(names)])
        assert other.forget(old) == 30
        assert has(tier, names) == [MISS] * 30 + [HIT] * 30
        assert other.forget(old) == 0
        assert other.epoch().number == new

    def test_what_was_used_stays(self, tier: SharedTier) -> None:
        names = [name(i, tier.epoch().number) for i in (1, 2)]
        write(tier, [(names[0], filled(PAGE, 1))])
        tier.touch(names)
        tier.touch([])
        tier.upkeep()
        assert has(tier, names) == [HIT, MISS]

    def test_closed_for_all_that_is_shared_too(self, tier: SharedTier) -> None:
        tier.close()
        mark = Mark(b"", b"", 1)
        for verb in (
            tier.epoch,
            tier.begin_epoch,
            lambda: tier.forget(1),
            lambda: tier.add_mark(mark),
        ):
            with pytest.raises(TierUnavailable):
                verb()

    @HISTORY
    @given(history=st.lists(STORE_ACTIONS, max_size=25))
    def test_random_history(self, tmp_path: Path, history: list[tuple[str, Any]]) -> None:
        """Of two nodes that take turns."""
        place, model = self.new_place(), dict[bytes, bytes]()
        tiers = [self.make_tier(self.server, place) for _ in range(2)]
        try:
            for number, (verb, what) in enumerate(history):
                step(tiers[number % 2], model, verb, what)
            step(tiers[len(history) % 2], model, "read", list(range(10)))
        finally:
            for tier in tiers:
                tier.close()


class SharedTierContract(SharedStoreContract):
    """Subclass, implement `start_server` and `make_tier`, and pytest collects the tests.

    ``outlives``: what was stored is still there after the server was killed and started again.
    """

    outlives: ClassVar[bool] = False
    server: Server

    def unavailable(self, tier: SharedTier) -> None:
        """Every verb says so, in time, and none of them touches what is left."""
        for verb in (
            lambda: tier.stat([name(1)]),
            lambda: tier.read([name(1)], [empty(PAGE)]),
            lambda: write(tier, [(name(2), filled(PAGE, 2))]),
            lambda: tier.delete([name(3)]),
            tier.epoch,
        ):
            begun = time.monotonic()
            with pytest.raises(TierUnavailable):
                verb()
            assert time.monotonic() - begun < tier.limits.timeout_s + MARGIN_S

    def test_a_server_that_was_killed(self, tier: SharedTier) -> None:
        data = filled(3 * PAGE, 1)
        write(tier, [(name(1), data)])
        self.server.kill()
        try:
            self.unavailable(tier)
        finally:
            self.server.restart()
        self.until_it_answers(tier)
        if self.outlives:
            assert read_one(tier, name(1), 3 * PAGE) == (HIT, bytes(data))
        else:
            assert read_one(tier, name(1), 3 * PAGE)[0] in (HIT, MISS)
        assert write(tier, [(name(1), data)]) == [HIT]
        assert read_one(tier, name(1), 3 * PAGE) == (HIT, bytes(data))

    def test_a_server_that_is_not_there_when_the_node_starts(self, place: str) -> None:
        """A tier may refuse to be made, or be made and refuse its verbs; it does not hang."""
        self.server.kill()
        begun, tier = time.monotonic(), None
        try:
            tier = self.make_tier(self.server, place)
            self.unavailable(tier)
        except TierUnavailable:
            assert tier is None
            assert time.monotonic() - begun < 30
        finally:
            self.server.restart()
            if tier is not None:
                self.until_it_answers(tier)
                tier.close()

    def test_a_server_that_hangs(self, tier: SharedTier) -> None:
        assert tier.limits.timeout_s <= 30, "or nobody can wait for the end of this test"
        write(tier, [(name(1), filled(PAGE, 1))])
        self.server.pause()
        try:
            self.unavailable(tier)
        finally:
            self.server.resume()
        self.until_it_answers(tier)
        assert outcomes(tier.read([name(1)], [empty(PAGE)]))[0] in (HIT, MISS)

    def test_a_server_that_is_killed_while_many_use_it(self, tier: SharedTier) -> None:
        """Whatever is read is whole; everything else is a miss, a failure, or an unavailable."""
        nbytes, stop = 64 * PAGE, threading.Event()
        wanted = {i: bytes(filled(nbytes, i)) for i in range(4)}
        write(tier, [(name(i), filled(nbytes, i)) for i in range(4)])

        def use(seed: int) -> int:
            num_hits = 0
            while not stop.is_set():
                for i in range(4):
                    try:
                        if seed % 2:
                            write(tier, [(name(i), filled(nbytes, i))])
                            continue
                        outcome, data = read_one(tier, name(i), nbytes)
                    except TierUnavailable:
                        time.sleep(0.01)
                        continue
                    if outcome is HIT:
                        num_hits += 1
                        assert data == wanted[i]
            return num_hits

        with ThreadPoolExecutor(4) as threads:
            work = [threads.submit(use, seed) for seed in range(4)]
            try:
                time.sleep(0.5)
                self.server.kill()
                time.sleep(0.2)
            finally:
                self.server.restart()
            time.sleep(0.5)
            stop.set()
            assert sum(one.result() for one in work) > 0

    def test_a_server_that_is_full(self, tier: SharedTier) -> None:
        data = filled(4 * PAGE, 1)
        write(tier, [(name(1), data)])
        if not self.server.fill():
            pytest.skip("this one has no bound that a test can reach")
        try:
            # Many, for a store may have kept a little room, or evict what is old.
            answers = []
            try:
                for i in range(2, 10):
                    answers += write(tier, [(name(i), filled(256 * PAGE, i))])
            except TierUnavailable:
                answers.append(FAILED)
            assert set(answers) <= {HIT, FAILED}
            assert read_one(tier, name(1), 4 * PAGE) in ((HIT, bytes(data)), (MISS, b""))
        finally:
            self.server.make_room()
        self.until_it_answers(tier)
        assert write(tier, [(name(1), data)]) == [HIT]

    def until_it_answers(self, tier: SharedTier) -> None:
        """A tier comes back by itself."""
        deadline = time.monotonic() + 60
        while True:
            try:
                tier.stat([name(0)])
                return
            except TierUnavailable:
                assert time.monotonic() < deadline, "it never came back"
                time.sleep(0.1)
