"""The contract of owned tiers, wrappers included, as a class of tests to subclass.

::

    class TestMine(OwnedTierContract):
        def make_tier(self, folder):
            return MyTier(folder)
"""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import TierUnavailable
from kvstrata.testing.stores import (
    FAILED,
    HISTORY,
    HIT,
    MISS,
    NUMBERS,
    PAGE,
    SIZES,
    STORE_ACTIONS,
    StoreContract,
    empty,
    filled,
    has,
    object_id,
    outcomes,
    read_one,
    step,
    write,
)
from kvstrata.tiers.base import Found, OwnedTier, Store


def scan_all(tier: OwnedTier) -> list[Found]:
    """Everything a scan yields, in order."""
    return [found for batch in tier.scan() for found in batch]


_OWNED_ACTIONS = STORE_ACTIONS | st.tuples(
    st.sampled_from(["reject", "scan", "clear", "touch", "reopen"]), st.lists(NUMBERS)
)


class OwnedTierContract(StoreContract):
    """Subclass, implement `make_tier`, and pytest collects the tests, those of a store included.

    ``persistent``: a tier that is closed and made again on its folder has what it had before.
    """

    persistent = False

    def make_tier(self, folder: Path) -> OwnedTier:
        """A tier that keeps what it must keep in ``folder``, empty unless one was there before."""
        raise NotImplementedError("a subclass says which tier is under test")

    def make_store(self, folder: Path) -> Store:
        return self.make_tier(folder)

    @pytest.fixture
    def tier(self, store: Store) -> OwnedTier:
        assert isinstance(store, OwnedTier)
        return store

    def test_nothing_is_found(self, tier: OwnedTier) -> None:
        ids = [object_id(1), object_id(2)]
        tier.touch(ids)
        tier.touch([])
        assert tier.reject(ids) == [MISS, MISS]
        assert tier.reject([]) == []
        assert scan_all(tier) == []

    @pytest.mark.parametrize("then", [PAGE, 2 * PAGE, 3 * PAGE])
    def test_what_was_replaced_is_not_found(self, tier: OwnedTier, then: int) -> None:
        one = object_id(1)
        write(tier, [(one, filled(2 * PAGE, 1))])
        write(tier, [(one, filled(then, 2))])
        assert [(found.object_id, found.nbytes) for found in scan_all(tier)] == [(one, then)]
        tier.delete([one])
        assert scan_all(tier) == []

    def test_headers(self, tier: OwnedTier) -> None:
        """Each object's first page; so does what a tier has that knows no shorter way."""
        ids = [object_id(i) for i in range(len(SIZES))]
        data = [filled(nbytes, nbytes) for nbytes in SIZES]
        write(tier, list(zip(ids, data, strict=True)))
        pages = [bytes(one[:PAGE]) for one in data]
        asked = [*ids, object_id(99)]
        assert tier.headers(asked) == [*pages, MISS]
        assert OwnedTier.headers(tier, asked) == [*pages, MISS]
        assert tier.headers([]) == []
        tier.delete(ids[:1])
        write(tier, [(ids[1], data[2])])
        assert tier.headers(ids[:2]) == [MISS, pages[2]]

    def test_rejected_is_gone_and_can_be_stored_again(self, tier: OwnedTier) -> None:
        one, other = object_id(1), object_id(2)
        write(tier, [(one, filled(PAGE, 1)), (other, filled(PAGE, 2))])
        assert tier.reject([one]) == [HIT]
        assert has(tier, [one, other]) == [MISS, HIT]
        assert [found.object_id for found in scan_all(tier)] == [other]
        assert write(tier, [(one, filled(PAGE, 3))]) == [HIT]
        assert read_one(tier, one, PAGE) == (HIT, bytes(filled(PAGE, 3)))

    def test_scan_is_least_recently_used_first(self, tier: OwnedTier) -> None:
        ids = [object_id(i) for i in (3, 1, 4, 2)]
        write(tier, [(one, filled(SIZES[i], i)) for i, one in enumerate(ids)])
        tier.touch([ids[1], object_id(99)])
        tier.touch([ids[0]])
        found = scan_all(tier)
        assert [one.object_id for one in found] == [ids[2], ids[3], ids[1], ids[0]]
        assert [one.nbytes for one in found] == [SIZES[2], SIZES[3], SIZES[1], SIZES[0]]
        used = [one.last_used for one in found]
        assert used == sorted(used)
        assert used[0] > 1_600_000_000

    def test_an_abandoned_scan_harms_nothing(self, tier: OwnedTier) -> None:
        write(tier, [(object_id(1), filled(PAGE, 1))])
        scan = tier.scan()
        assert next(scan)
        del scan
        assert len(scan_all(tier)) == 1

    def test_clear(self, tier: OwnedTier) -> None:
        ids = [object_id(i) for i in range(20)]
        write(tier, [(one, filled(PAGE, i)) for i, one in enumerate(ids)])
        epoch = tier.epoch
        tier.clear()
        assert tier.epoch == epoch + 1
        assert has(tier, ids) == [MISS] * 20
        assert outcomes(tier.read(ids, [empty(PAGE) for _ in ids])) == [MISS] * 20
        assert scan_all(tier) == []
        assert write(tier, [(ids[0], filled(PAGE, 7))]) == [HIT]
        assert read_one(tier, ids[0], PAGE) == (HIT, bytes(filled(PAGE, 7)))
        assert [found.object_id for found in scan_all(tier)] == [ids[0]]

    def test_survives_reopening(self, tmp_path: Path) -> None:
        if not self.persistent:
            pytest.skip("this tier ends with its process")
        tier = self.make_tier(tmp_path / "tier")
        write(tier, [(object_id(i), filled(PAGE, i)) for i in range(3)])
        tier.clear()
        write(tier, [(object_id(i), filled(2 * PAGE, i)) for i in (1, 2)])
        tier.close()
        tier = self.make_tier(tmp_path / "tier")
        assert tier.epoch == 1
        assert has(tier, [object_id(i) for i in range(3)]) == [MISS, HIT, HIT]
        assert [found.object_id for found in scan_all(tier)] == [object_id(1), object_id(2)]
        assert read_one(tier, object_id(2), 2 * PAGE) == (HIT, bytes(filled(2 * PAGE, 2)))
        tier.close()

    def test_closed_for_its_owner_too(self, tier: OwnedTier) -> None:
        tier.close()
        with pytest.raises(TierUnavailable):
            scan_all(tier)
        with pytest.raises(TierUnavailable):
            tier.headers([object_id(1)])
        with pytest.raises(TierUnavailable):
            tier.clear()

    def test_of_many_sizes(self, tier: OwnedTier) -> None:
        """A codec gives every object a size of its own."""
        ids = [object_id(i) for i in range(60)]
        write(tier, [(one, filled((1 + i) * PAGE, i)) for i, one in enumerate(ids)])
        tier.touch(ids[::-1])
        found = [(one.object_id, one.nbytes) for one in scan_all(tier)]
        assert found == [(one, (1 + i) * PAGE) for i, one in reversed(list(enumerate(ids)))]
        write(tier, [(ids[7], filled(PAGE, 3))])
        assert len(scan_all(tier)) == 60
        assert tier.delete(ids) == [HIT] * 60
        assert scan_all(tier) == []

    def test_writers_of_one_id_leave_one_object(self, tier: OwnedTier) -> None:
        one, start = object_id(1), threading.Barrier(4)

        def change(number: int) -> None:
            start.wait()
            for i in range(15):
                nbytes = SIZES[(number + i) % len(SIZES)]
                assert write(tier, [(one, filled(nbytes, number))]) == [HIT]

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(change, range(4)))
        (found,) = scan_all(tier)
        assert read_one(tier, one, found.nbytes)[0] is HIT

    def test_clear_while_others_write(self, tier: OwnedTier) -> None:
        """What is there after a clear was written after it began."""
        start = threading.Barrier(3)

        def change(number: int) -> None:
            start.wait()
            for i in range(40):
                (outcome,) = write(tier, [(object_id(100 * number + i), filled(PAGE, i))])
                assert outcome in (HIT, FAILED)

        write(tier, [(object_id(999), filled(PAGE, 0))])
        with ThreadPoolExecutor(2) as threads:
            work = [threads.submit(change, number) for number in (1, 2)]
            start.wait()
            tier.clear()
            assert has(tier, [object_id(999)]) == [MISS]
            for one in work:
                one.result()
        for found in scan_all(tier):
            assert found.object_id != object_id(999)
            assert read_one(tier, found.object_id, found.nbytes)[0] is HIT

    @HISTORY
    @given(history=st.lists(_OWNED_ACTIONS, max_size=25))
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
                    owned_step(tier, model, verb, what)
            owned_step(tier, model, "scan", [])
            owned_step(tier, model, "read", list(range(10)))
        finally:
            tier.close()


def owned_step(tier: OwnedTier, model: dict[bytes, bytes], verb: str, what: Any) -> None:
    """`step`, for the verbs of an owned tier too."""
    ids = [object_id(number) for number in what] if verb != "write" else []
    if verb == "reject":
        expected = [HIT if model.pop(one, None) is not None else MISS for one in ids]
        assert tier.reject(ids) == expected
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
    else:
        step(tier, model, verb, what)
