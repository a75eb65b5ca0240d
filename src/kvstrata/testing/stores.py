"""The contract of stores, wrappers included, as a class of tests to subclass, and what tests of
stores are made of.

::

    class TestMine(StoreContract):
        def make_store(self, folder):
            return MyStore(folder)
"""

from __future__ import annotations

import mmap
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.tiers.base import Outcome, Put, Stat, Store

PAGE = 4096
SIZES = [PAGE, 2 * PAGE, 3 * PAGE, 17 * PAGE]

HIT, MISS, FAILED = Outcome.HIT, Outcome.MISS, Outcome.FAILED


def object_id(number: int) -> bytes:
    """An object id of 36 bytes, distinct for every number below 65536; 0 and 256 share a shard."""
    return bytes([number % 256]) + number.to_bytes(31, "big") + number.to_bytes(4, "little")


def empty(nbytes: int) -> memoryview:
    """A buffer of zeros, aligned as slots of the pool are."""
    return memoryview(mmap.mmap(-1, nbytes))


def filled(nbytes: int, seed: int) -> memoryview:
    """An aligned buffer of random bytes, the same for the same seed."""
    buffer = empty(nbytes)
    buffer[:] = random.Random(seed).randbytes(nbytes)
    return buffer


def put(one: bytes, data: memoryview, if_absent: bool = False) -> Put:
    """A whole object in one buffer, as a store wants it."""
    return Put(one, data[:PAGE], data[PAGE:], if_absent)


def write(store: Store, objects: Sequence[tuple[bytes, memoryview]]) -> list[Outcome]:
    """Write whole objects."""
    return store.write([put(one, data) for one, data in objects])


def outcomes(answers: Sequence[int | Stat | Outcome]) -> list[Outcome]:
    """HIT for what is there, whatever else is known of it."""
    return [one if isinstance(one, Outcome) else HIT for one in answers]


def has(store: Store, ids: Sequence[bytes]) -> list[Outcome]:
    """Which objects are there."""
    return outcomes(store.stat(ids))


def read_one(store: Store, one: bytes, nbytes: int) -> tuple[Outcome, bytes]:
    """The outcome of a read into a buffer of this size, and the bytes; empty unless it is a hit."""
    into = empty(nbytes)
    (answer,) = store.read([one], [into])
    return (HIT, bytes(into[:answer])) if isinstance(answer, int) else (answer, b"")


# Some verbs, drawn; a history is a list of them.
NUMBERS = st.integers(0, 9)
_WRITES = st.lists(
    st.tuples(NUMBERS, st.sampled_from(SIZES), st.integers(0, 99), st.booleans()), max_size=4
)
STORE_ACTIONS = st.tuples(st.just("write"), _WRITES) | st.tuples(
    st.sampled_from(["read", "stat", "delete"]), st.lists(NUMBERS)
)
HISTORY = settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
    ],
)


class StoreContract:
    """Subclass, implement `make_store`, and pytest collects the tests."""

    def make_store(self, folder: Path) -> Store:
        """An empty store, which may keep what it must keep in ``folder``."""
        raise NotImplementedError("a subclass says which store is under test")

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = self.make_store(tmp_path / "tier")
        yield store
        store.close()

    def test_empty(self, store: Store) -> None:
        ids = [object_id(1), object_id(2)]
        assert store.stat(ids) == [MISS, MISS]
        assert store.read(ids, [empty(PAGE), empty(PAGE)]) == [MISS, MISS]
        assert store.delete(ids) == [MISS, MISS]
        assert store.name

    def test_empty_batches(self, store: Store) -> None:
        assert store.stat([]) == store.read([], []) == store.write([]) == store.delete([]) == []

    def test_limits_leave_room_for_something(self, store: Store) -> None:
        limits = store.limits
        assert min(limits.batch_objects, limits.concurrency) >= 1
        assert limits.batch_bytes >= 2 * PAGE
        assert limits.timeout_s > 0

    def test_a_batch_as_large_as_may_be(self, store: Store) -> None:
        ids = [object_id(i) for i in range(min(store.limits.batch_objects, 300))]
        assert write(store, [(one, filled(PAGE, 1)) for one in ids]) == [HIT] * len(ids)
        assert has(store, ids) == [HIT] * len(ids)
        assert store.delete(ids) == [HIT] * len(ids)

    @pytest.mark.parametrize("nbytes", [PAGE, 2 * PAGE, 300 * PAGE])
    def test_round_trip(self, store: Store, nbytes: int) -> None:
        data = filled(nbytes, 1)
        assert write(store, [(object_id(1), data)]) == [HIT]
        (stat,) = store.stat([object_id(1)])
        assert isinstance(stat, Stat)
        assert stat.nbytes == nbytes
        assert read_one(store, object_id(1), nbytes) == (HIT, bytes(data))

    def test_the_buffer_is_the_callers_again(self, store: Store) -> None:
        data = filled(PAGE, 1)
        before = bytes(data)
        write(store, [(object_id(1), data)])
        data[:] = bytes(PAGE)
        into = empty(PAGE)
        assert outcomes(store.read([object_id(1)], [into])) == [HIT]
        into[:] = bytes(PAGE)
        assert read_one(store, object_id(1), PAGE) == (HIT, before)

    def test_ids_that_differ_in_any_byte(self, store: Store) -> None:
        ids = [bytes(i) + b"\1" + bytes(35 - i) for i in range(36)]
        write(store, [(one, filled(PAGE, i)) for i, one in enumerate(ids)])
        buffers = [empty(PAGE) for _ in ids]
        assert outcomes(store.read(ids, buffers)) == [HIT] * 36
        assert buffers == [filled(PAGE, i) for i in range(36)]

    def test_missing_ids_mid_batch(self, store: Store) -> None:
        for i in (0, 2, 5):
            write(store, [(object_id(i), filled(PAGE, i))])
        ids = [object_id(i) for i in range(6)]
        expected = [HIT, MISS, HIT, MISS, MISS, HIT]
        assert has(store, ids) == expected
        buffers = [empty(PAGE) for _ in ids]
        assert outcomes(store.read(ids, buffers)) == expected
        for i in (0, 2, 5):
            assert buffers[i] == filled(PAGE, i)
        assert store.delete(ids) == expected
        assert has(store, ids) == [MISS] * 6

    def test_order_of_a_batch_is_the_callers(self, store: Store) -> None:
        ids = [object_id(i) for i in (7, 3, 9, 1)]
        write(store, [(one, filled(PAGE, i)) for i, one in enumerate(ids)])
        buffers = [empty(PAGE) for _ in ids]
        assert outcomes(store.read(ids[::-1], buffers)) == [HIT] * 4
        assert buffers == [filled(PAGE, i) for i in (3, 2, 1, 0)]

    def test_one_id_twice_in_a_batch(self, store: Store) -> None:
        one = object_id(1)
        assert write(store, [(one, filled(PAGE, 1)), (one, filled(PAGE, 2))]) == [HIT, HIT]
        assert read_one(store, one, PAGE) == (HIT, bytes(filled(PAGE, 2)))
        assert store.delete([one, one]) == [HIT, MISS]

    @pytest.mark.parametrize("then", [PAGE, 2 * PAGE, 3 * PAGE])
    def test_replace(self, store: Store, then: int) -> None:
        one = object_id(1)
        write(store, [(one, filled(2 * PAGE, 1))])
        assert write(store, [(one, filled(then, 2))]) == [HIT]
        assert read_one(store, one, then) == (HIT, bytes(filled(then, 2)))
        assert read_one(store, one, 3 * PAGE) == (HIT, bytes(filled(then, 2)))
        assert store.delete([one]) == [HIT]
        assert has(store, [one]) == [MISS]

    def test_a_buffer_is_an_upper_bound(self, store: Store) -> None:
        write(store, [(object_id(i), filled((1 + i) * PAGE, i)) for i in range(3)])
        ids, buffers = [object_id(i) for i in range(4)], [empty(2 * PAGE) for _ in range(4)]
        assert store.read(ids, buffers) == [PAGE, 2 * PAGE, FAILED, MISS]
        assert buffers[0][:PAGE] == filled(PAGE, 0)
        assert buffers[1] == filled(2 * PAGE, 1)

    def test_what_lies_in_a_bound_pool_and_what_does_not(self, store: Store) -> None:
        pool = filled(64 * PAGE, 1)
        store.bind(pool)
        inside, outside = pool[8 * PAGE : 11 * PAGE], filled(3 * PAGE, 2)
        puts = [
            Put(object_id(1), filled(PAGE, 3), inside),
            put(object_id(2), pool[20 * PAGE : 22 * PAGE]),
            put(object_id(3), outside),
        ]
        wanted = [bytes(one.header_page) + bytes(one.payload) for one in puts]
        assert store.write(puts) == [HIT] * 3
        ids = [one.object_id for one in puts]
        into = [pool[32 * PAGE : 38 * PAGE], empty(2 * PAGE), pool[40 * PAGE : 43 * PAGE]]
        assert store.read(ids, into) == [4 * PAGE, 2 * PAGE, 3 * PAGE]
        assert [bytes(view[: len(data)]) for view, data in zip(into, wanted, strict=True)] == wanted
        assert pool[: 32 * PAGE] == filled(64 * PAGE, 1)[: 32 * PAGE]
        assert pool[43 * PAGE :] == filled(64 * PAGE, 1)[43 * PAGE :]

    def test_a_careful_write_spares_what_is_there(self, store: Store) -> None:
        write(store, [(object_id(1), filled(PAGE, 1))])
        puts = [put(object_id(i), filled(2 * PAGE, 9), if_absent=True) for i in (0, 1, 2, 2)]
        assert store.write(puts) == [HIT, MISS, HIT, MISS]
        assert read_one(store, object_id(1), 2 * PAGE) == (HIT, bytes(filled(PAGE, 1)))
        store.delete([object_id(1)])
        assert store.write(puts[1:2]) == [HIT]
        assert read_one(store, object_id(1), 2 * PAGE) == (HIT, bytes(filled(2 * PAGE, 9)))

    def test_careful_writers_at_once(self, store: Store) -> None:
        """Exactly one of them writes, and it is that one's bytes that are there."""
        ids, start = [object_id(i) for i in range(10)], threading.Barrier(3)

        def race(number: int) -> list[Outcome]:
            start.wait()
            return [store.write([put(one, filled(PAGE, number), True)])[0] for one in ids]

        with ThreadPoolExecutor(3) as threads:
            racers = list(threads.map(race, range(3)))
        for one, answers in zip(ids, zip(*racers, strict=True), strict=True):
            assert sorted(answers, key=str) == [HIT, MISS, MISS]
            assert read_one(store, one, PAGE) == (HIT, bytes(filled(PAGE, answers.index(HIT))))

    def test_another_version_is_not_deleted(self, store: Store) -> None:
        ids = [object_id(1), object_id(2)]
        write(store, [(one, filled(PAGE, 1)) for one in ids])
        before = [one.version for one in store.stat(ids) if isinstance(one, Stat)]
        write(store, [(ids[0], filled(PAGE, 1))])  # the same bytes, and yet another object
        (after,) = store.stat(ids[:1])
        assert isinstance(after, Stat)
        if before[0]:
            assert after.version != before[0]
            assert store.delete(ids, before) == [MISS, HIT]
            assert store.delete(ids[:1], [after.version]) == [HIT]
        else:  # this store knows no versions, so none is the right one
            assert store.delete(ids, ["no such version", ""]) == [MISS, HIT]
            assert has(store, ids) == [HIT, MISS]

    def test_close_twice_and_then_nothing_works(self, store: Store) -> None:
        write(store, [(object_id(1), filled(PAGE, 1))])
        store.close()
        store.close()
        with pytest.raises(TierUnavailable):
            store.stat([object_id(1)])
        with pytest.raises(TierUnavailable):
            store.read([object_id(1)], [empty(PAGE)])
        with pytest.raises(TierUnavailable):
            write(store, [(object_id(1), filled(PAGE, 1))])
        with pytest.raises(TierUnavailable):
            store.delete([object_id(1)])

    def test_readers_and_writers_at_once(self, store: Store) -> None:
        """Whatever a reader sees is one whole object that somebody wrote under that id."""
        nbytes, ids = 16 * PAGE, [object_id(i) for i in range(4)]
        versions = [[filled(nbytes, 100 * i + n) for n in range(3)] for i in range(4)]
        wanted = [{bytes(data) for data in of_one} for of_one in versions]
        start = threading.Barrier(4)

        def change(seed: int) -> int:
            draw = random.Random(seed)
            start.wait()
            for _ in range(40):
                i = draw.randrange(4)
                if draw.random() < 0.2:
                    assert store.delete([ids[i]])[0] in (HIT, MISS)
                else:
                    assert write(store, [(ids[i], versions[i][draw.randrange(3)])]) == [HIT]
            return 0

        def read(seed: int) -> int:
            draw = random.Random(seed)
            start.wait()
            num_hits = 0
            for _ in range(80):
                i = draw.randrange(4)
                outcome, data = read_one(store, ids[i], nbytes)
                assert outcome in (HIT, MISS)
                if outcome is HIT:
                    num_hits += 1
                    assert data in wanted[i]
            return num_hits

        for i, one in enumerate(ids):
            write(store, [(one, versions[i][0])])
        with ThreadPoolExecutor(4) as threads:
            work = [threads.submit(change, 1), threads.submit(change, 2)]
            work += [threads.submit(read, 3), threads.submit(read, 4)]
            assert sum(one.result() for one in work) > 0

    @HISTORY
    @given(history=st.lists(STORE_ACTIONS, max_size=25))
    def test_random_history(self, tmp_path: Path, history: list[tuple[str, Any]]) -> None:
        store = self.make_store(Path(tempfile.mkdtemp(dir=tmp_path)) / "tier")
        model: dict[bytes, bytes] = {}
        try:
            for verb, what in history:
                step(store, model, verb, what)
            step(store, model, "read", list(range(10)))
        finally:
            store.close()


def step(store: Store, model: dict[bytes, bytes], verb: str, what: Any) -> None:
    """Do one thing to a store and to a dictionary, and compare the answers."""
    if verb == "write":
        puts = [put(object_id(n), filled(size, seed), careful) for n, size, seed, careful in what]
        expected = []
        for one in puts:
            spared = one.if_absent and one.object_id in model
            expected.append(MISS if spared else HIT)
            if not spared:
                model.pop(one.object_id, None)
                model[one.object_id] = bytes(one.header_page) + bytes(one.payload)
        assert _write(store, puts) == expected
        return
    ids = [object_id(number) for number in what]
    if verb == "delete":
        expected = [HIT if model.pop(one, None) is not None else MISS for one in ids]
        assert store.delete(ids) == expected
        return
    sizes = [len(model[one]) if one in model else MISS for one in ids]
    if verb == "stat":
        found = [one.nbytes if isinstance(one, Stat) else one for one in store.stat(ids)]
        assert found == sizes
    elif verb == "read":
        buffers = [empty(max(SIZES)) for _ in ids]
        assert store.read(ids, buffers) == sizes
        for name, buffer in zip(ids, buffers, strict=True):
            assert name not in model or buffer[: len(model[name])] == model[name]


def _write(store: Store, puts: Sequence[Put]) -> list[Outcome]:
    # What was cleared counts until it is gone, so a tier may be full for a while.
    deadline = time.monotonic() + 60
    while True:
        try:
            return store.write(puts)
        except TierFull:
            assert time.monotonic() < deadline
