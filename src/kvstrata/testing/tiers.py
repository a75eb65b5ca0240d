"""The contract every tier keeps, wrappers included, as a class of tests to subclass.

::

    class TestMine(TierContract):
        def make_tier(self, folder):
            return MyTier(folder)
"""

from __future__ import annotations

import mmap
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.tiers.base import Found, Outcome, Tier

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


def read_one(tier: Tier, one: bytes, nbytes: int) -> tuple[Outcome, bytes]:
    """The outcome of a read, and the bytes; empty unless it is a hit."""
    into = empty(nbytes)
    (outcome,) = tier.read([one], [into])
    return outcome, bytes(into) if outcome is HIT else b""


def scan_all(tier: Tier) -> list[Found]:
    """Everything a scan yields, in order."""
    return [found for batch in tier.scan() for found in batch]


# Some of a tier's verbs, drawn; a history is a list of them.
_NUMBERS = st.integers(0, 9)
_ACTIONS = st.one_of(
    st.tuples(
        st.just("write"),
        st.lists(st.tuples(_NUMBERS, st.sampled_from(SIZES), st.integers(0, 99)), max_size=4),
    ),
    st.tuples(st.sampled_from(["read", "contains", "delete", "reject"]), st.lists(_NUMBERS)),
    st.tuples(st.sampled_from(["scan", "clear", "touch", "reopen"]), st.lists(_NUMBERS)),
)


class TierContract:
    """Subclass, implement `make_tier`, and pytest collects the tests.

    ``persistent``: a tier that is closed and made again on its folder has what it had before.
    """

    persistent = False

    def make_tier(self, folder: Path) -> Tier:
        """A tier that keeps what it must keep in ``folder``, empty unless one was there before."""
        raise NotImplementedError("a subclass says which tier is under test")

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = self.make_tier(tmp_path / "tier")
        yield tier
        tier.close()

    def test_empty(self, tier: Tier) -> None:
        ids = [object_id(1), object_id(2)]
        assert tier.contains(ids) == [MISS, MISS]
        assert tier.read(ids, [empty(PAGE), empty(PAGE)]) == [MISS, MISS]
        assert tier.delete(ids) == [MISS, MISS]
        assert tier.reject(ids) == [MISS, MISS]
        tier.touch(ids)
        assert scan_all(tier) == []
        assert tier.name

    def test_empty_batches(self, tier: Tier) -> None:
        assert tier.contains([]) == tier.read([], []) == tier.write([]) == tier.delete([]) == []
        assert tier.reject([]) == []
        tier.touch([])

    @pytest.mark.parametrize("nbytes", [PAGE, 2 * PAGE, 300 * PAGE])
    def test_round_trip(self, tier: Tier, nbytes: int) -> None:
        data = filled(nbytes, 1)
        assert tier.write([(object_id(1), data)]) == [HIT]
        assert tier.contains([object_id(1)]) == [HIT]
        assert read_one(tier, object_id(1), nbytes) == (HIT, bytes(data))

    def test_the_buffer_is_the_callers_again(self, tier: Tier) -> None:
        data = filled(PAGE, 1)
        before = bytes(data)
        tier.write([(object_id(1), data)])
        data[:] = bytes(PAGE)
        into = empty(PAGE)
        assert tier.read([object_id(1)], [into]) == [HIT]
        into[:] = bytes(PAGE)
        assert read_one(tier, object_id(1), PAGE) == (HIT, before)

    def test_ids_that_differ_in_any_byte(self, tier: Tier) -> None:
        ids = [bytes(i) + b"\1" + bytes(35 - i) for i in range(36)]
        tier.write([(one, filled(PAGE, i)) for i, one in enumerate(ids)])
        buffers = [empty(PAGE) for _ in ids]
        assert tier.read(ids, buffers) == [HIT] * 36
        assert buffers == [filled(PAGE, i) for i in range(36)]

    def test_missing_ids_mid_batch(self, tier: Tier) -> None:
        for i in (0, 2, 5):
            tier.write([(object_id(i), filled(PAGE, i))])
        ids = [object_id(i) for i in range(6)]
        expected = [HIT, MISS, HIT, MISS, MISS, HIT]
        assert tier.contains(ids) == expected
        buffers = [empty(PAGE) for _ in ids]
        assert tier.read(ids, buffers) == expected
        for i in (0, 2, 5):
            assert buffers[i] == filled(PAGE, i)
        assert tier.delete(ids) == expected
        assert tier.contains(ids) == [MISS] * 6

    def test_order_of_a_batch_is_the_callers(self, tier: Tier) -> None:
        ids = [object_id(i) for i in (7, 3, 9, 1)]
        tier.write([(one, filled(PAGE, i)) for i, one in enumerate(ids)])
        buffers = [empty(PAGE) for _ in ids]
        assert tier.read(ids[::-1], buffers) == [HIT] * 4
        assert buffers == [filled(PAGE, i) for i in (3, 2, 1, 0)]

    def test_one_id_twice_in_a_batch(self, tier: Tier) -> None:
        one = object_id(1)
        assert tier.write([(one, filled(PAGE, 1)), (one, filled(PAGE, 2))]) == [HIT, HIT]
        assert read_one(tier, one, PAGE) == (HIT, bytes(filled(PAGE, 2)))
        assert tier.delete([one, one]) == [HIT, MISS]

    @pytest.mark.parametrize("then", [PAGE, 2 * PAGE, 3 * PAGE])
    def test_replace(self, tier: Tier, then: int) -> None:
        one = object_id(1)
        tier.write([(one, filled(2 * PAGE, 1))])
        assert tier.write([(one, filled(then, 2))]) == [HIT]
        assert read_one(tier, one, then) == (HIT, bytes(filled(then, 2)))
        assert [(found.object_id, found.nbytes) for found in scan_all(tier)] == [(one, then)]
        if then != 2 * PAGE:
            assert read_one(tier, one, 2 * PAGE)[0] is not HIT
        assert tier.delete([one]) == [HIT]
        assert tier.contains([one]) == [MISS]
        assert scan_all(tier) == []

    @pytest.mark.parametrize("nbytes", [PAGE, 3 * PAGE])
    def test_a_buffer_of_another_size_is_no_hit(self, tier: Tier, nbytes: int) -> None:
        tier.write([(object_id(1), filled(2 * PAGE, 1))])
        tier.write([(object_id(2), filled(nbytes, 2))])
        assert read_one(tier, object_id(1), nbytes)[0] is not HIT
        assert read_one(tier, object_id(1), 2 * PAGE)[0] is HIT

    def test_rejected_is_gone_and_can_be_stored_again(self, tier: Tier) -> None:
        one, other = object_id(1), object_id(2)
        tier.write([(one, filled(PAGE, 1)), (other, filled(PAGE, 2))])
        assert tier.reject([one]) == [HIT]
        assert tier.contains([one, other]) == [MISS, HIT]
        assert [found.object_id for found in scan_all(tier)] == [other]
        assert tier.write([(one, filled(PAGE, 3))]) == [HIT]
        assert read_one(tier, one, PAGE) == (HIT, bytes(filled(PAGE, 3)))

    def test_scan_is_least_recently_used_first(self, tier: Tier) -> None:
        ids = [object_id(i) for i in (3, 1, 4, 2)]
        tier.write([(one, filled(SIZES[i], i)) for i, one in enumerate(ids)])
        tier.touch([ids[1], object_id(99)])
        tier.touch([ids[0]])
        found = scan_all(tier)
        assert [one.object_id for one in found] == [ids[2], ids[3], ids[1], ids[0]]
        assert [one.nbytes for one in found] == [SIZES[2], SIZES[3], SIZES[1], SIZES[0]]
        used = [one.last_used for one in found]
        assert used == sorted(used)
        assert used[0] > 1_600_000_000

    def test_an_abandoned_scan_harms_nothing(self, tier: Tier) -> None:
        tier.write([(object_id(1), filled(PAGE, 1))])
        scan = tier.scan()
        assert next(scan)
        del scan
        assert len(scan_all(tier)) == 1

    def test_clear(self, tier: Tier) -> None:
        ids = [object_id(i) for i in range(20)]
        tier.write([(one, filled(PAGE, i)) for i, one in enumerate(ids)])
        epoch = tier.epoch
        tier.clear()
        assert tier.epoch == epoch + 1
        assert tier.contains(ids) == [MISS] * 20
        assert tier.read(ids, [empty(PAGE) for _ in ids]) == [MISS] * 20
        assert scan_all(tier) == []
        assert tier.write([(ids[0], filled(PAGE, 7))]) == [HIT]
        assert read_one(tier, ids[0], PAGE) == (HIT, bytes(filled(PAGE, 7)))
        assert [found.object_id for found in scan_all(tier)] == [ids[0]]

    def test_survives_reopening(self, tmp_path: Path) -> None:
        if not self.persistent:
            pytest.skip("this tier ends with its process")
        tier = self.make_tier(tmp_path / "tier")
        tier.write([(object_id(i), filled(PAGE, i)) for i in range(3)])
        tier.clear()
        tier.write([(object_id(i), filled(2 * PAGE, i)) for i in (1, 2)])
        tier.close()
        tier = self.make_tier(tmp_path / "tier")
        assert tier.epoch == 1
        assert tier.contains([object_id(i) for i in range(3)]) == [MISS, HIT, HIT]
        assert [found.object_id for found in scan_all(tier)] == [object_id(1), object_id(2)]
        assert read_one(tier, object_id(2), 2 * PAGE) == (HIT, bytes(filled(2 * PAGE, 2)))
        tier.close()

    def test_close_twice_and_then_nothing_works(self, tier: Tier) -> None:
        tier.write([(object_id(1), filled(PAGE, 1))])
        tier.close()
        tier.close()
        with pytest.raises(TierUnavailable):
            tier.contains([object_id(1)])
        with pytest.raises(TierUnavailable):
            tier.read([object_id(1)], [empty(PAGE)])
        with pytest.raises(TierUnavailable):
            tier.write([(object_id(1), filled(PAGE, 1))])
        with pytest.raises(TierUnavailable):
            tier.delete([object_id(1)])
        with pytest.raises(TierUnavailable):
            scan_all(tier)
        with pytest.raises(TierUnavailable):
            tier.clear()

    def test_readers_and_writers_at_once(self, tier: Tier) -> None:
        """Whatever a reader sees is one whole object that somebody wrote under that id."""
        nbytes, ids = 16 * PAGE, [object_id(i) for i in range(4)]
        versions = [[filled(nbytes, 100 * i + n) for n in range(3)] for i in range(4)]
        wanted = [{bytes(data) for data in of_one} for of_one in versions]
        start = threading.Barrier(4)

        def write(seed: int) -> int:
            draw = random.Random(seed)
            start.wait()
            for _ in range(40):
                i = draw.randrange(4)
                if draw.random() < 0.2:
                    assert tier.delete([ids[i]])[0] in (HIT, MISS)
                else:
                    assert tier.write([(ids[i], versions[i][draw.randrange(3)])]) == [HIT]
            return 0

        def read(seed: int) -> int:
            draw = random.Random(seed)
            start.wait()
            num_hits = 0
            for _ in range(80):
                i = draw.randrange(4)
                outcome, data = read_one(tier, ids[i], nbytes)
                assert outcome in (HIT, MISS)
                if outcome is HIT:
                    num_hits += 1
                    assert data in wanted[i]
            return num_hits

        for i, one in enumerate(ids):
            tier.write([(one, versions[i][0])])
        with ThreadPoolExecutor(4) as threads:
            work = [threads.submit(write, 1), threads.submit(write, 2)]
            work += [threads.submit(read, 3), threads.submit(read, 4)]
            assert sum(one.result() for one in work) > 0
        stored = {found.object_id for found in scan_all(tier)}
        assert [one in stored for one in ids] == [one is HIT for one in tier.contains(ids)]

    def test_writers_of_one_id_leave_one_object(self, tier: Tier) -> None:
        one, start = object_id(1), threading.Barrier(4)

        def write(number: int) -> None:
            start.wait()
            for i in range(15):
                nbytes = SIZES[(number + i) % len(SIZES)]
                assert tier.write([(one, filled(nbytes, number))]) == [HIT]

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, range(4)))
        (found,) = scan_all(tier)
        assert read_one(tier, one, found.nbytes)[0] is HIT

    def test_clear_while_others_write(self, tier: Tier) -> None:
        """What is there after a clear was written after it began."""
        start = threading.Barrier(3)

        def write(number: int) -> None:
            start.wait()
            for i in range(40):
                outcomes = tier.write([(object_id(100 * number + i), filled(PAGE, i))])
                assert outcomes[0] in (HIT, FAILED)

        tier.write([(object_id(999), filled(PAGE, 0))])
        with ThreadPoolExecutor(2) as threads:
            work = [threads.submit(write, number) for number in (1, 2)]
            start.wait()
            tier.clear()
            assert tier.contains([object_id(999)]) == [MISS]
            for one in work:
                one.result()
        for found in scan_all(tier):
            assert found.object_id != object_id(999)
            assert read_one(tier, found.object_id, found.nbytes)[0] is HIT

    @settings(
        deadline=None,
        max_examples=30,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
        ],
    )
    @given(history=st.lists(_ACTIONS, max_size=25))
    def test_random_history(self, tmp_path: Path, history: list[tuple[str, Any]]) -> None:
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "tier"
        tier = self.make_tier(folder)
        model: dict[bytes, bytes] = {}  # least recently used first
        try:
            for verb, what in history:
                if verb == "reopen" and self.persistent:
                    tier.close()
                    tier = self.make_tier(folder)
                else:
                    self._step(tier, model, verb, what)
            self._step(tier, model, "scan", [])
            self._step(tier, model, "read", list(range(10)))
        finally:
            tier.close()

    def _write(self, tier: Tier, objects: list[tuple[bytes, memoryview]]) -> list[Outcome]:
        # What was cleared counts until it is gone, so a tier may be full for a while.
        deadline = time.monotonic() + 60
        while True:
            try:
                return tier.write(objects)
            except TierFull:
                assert time.monotonic() < deadline

    def _step(self, tier: Tier, model: dict[bytes, bytes], verb: str, what: Any) -> None:
        if verb == "write":
            objects = [(object_id(n), filled(size, seed)) for n, size, seed in what]
            assert self._write(tier, objects) == [HIT] * len(objects)
            for one, data in objects:
                model.pop(one, None)
                model[one] = bytes(data)
            return
        ids = [object_id(number) for number in what]
        there = [HIT if one in model else MISS for one in ids]
        if verb == "contains":
            assert tier.contains(ids) == there
        elif verb == "read":
            buffers = [empty(len(model.get(one, bytes(PAGE)))) for one in ids]
            assert tier.read(ids, buffers) == there
            for one, buffer in zip(ids, buffers, strict=True):
                assert one not in model or model[one] == buffer
        elif verb in ("delete", "reject"):
            expected = [HIT if model.pop(one, None) is not None else MISS for one in ids]
            assert (tier.delete if verb == "delete" else tier.reject)(ids) == expected
        elif verb == "touch":
            tier.touch(ids)
            for one in ids:
                if one in model:
                    model[one] = model.pop(one)
        elif verb == "clear":
            tier.clear()
            model.clear()
        elif verb == "scan":
            found = [(one.object_id, one.nbytes) for one in scan_all(tier)]
            assert found == [(one, len(data)) for one, data in model.items()]
