"""The object store tier, against a real S3 server and in a folder: its contract, and its errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from obstore.exceptions import PreconditionError
from tests.support.object_stores import SHORT_S, TIMEOUT_S, in_s3, let_in

from kvstrata.errors import TierUnavailable
from kvstrata.testing.ground import Ground
from kvstrata.testing.servers.seaweedfs import SeaweedFS
from kvstrata.testing.shared import SharedStoreContract, SharedTierContract, name
from kvstrata.testing.stores import (
    FAILED,
    HIT,
    PAGE,
    empty,
    filled,
    has,
    write,
)
from kvstrata.tiers.base import SharedTier
from kvstrata.tiers.epochs import encode_epoch, new_epoch
from kvstrata.tiers.object_store.paths import EPOCH, name_of, path_of
from kvstrata.tiers.object_store.tier import RANGE_BYTES, ObjectStoreTier


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    let_in(monkeypatch)


class OfThisTier(SharedStoreContract):
    """What holds in a store and in a folder, and is not for every shared tier."""

    def make_tier(
        self, server: Any, place: str, capacity_bytes: int | None = 1 << 40
    ) -> ObjectStoreTier:
        raise NotImplementedError

    def test_two_clears_at_once(self, place: str) -> None:
        tiers, start = [self.make_tier(self.server, place) for _ in range(2)], threading.Barrier(2)
        for _ in range(5):
            before = tiers[0].epoch()

            def clear(tier: SharedTier) -> int:
                start.wait()
                return tier.begin_epoch().number

            with ThreadPoolExecutor(2) as threads:
                begun = set(threads.map(clear, tiers))
            assert before.number not in begun
            assert {tier.epoch().number for tier in tiers} <= begun
            assert len({tier.epoch().number for tier in tiers}) == 1
        for tier in tiers:
            tier.close()

    def test_a_replacement_that_comes_late_changes_nothing(self, place: str) -> None:
        """A request that was sent twice must not bring back an epoch that has passed."""
        tier = self.make_tier(self.server, place)
        client, turn = tier._client, tier._client.turn()
        tier.epoch()
        found = client.small(EPOCH, turn)
        assert found is not None
        present = tier.begin_epoch()
        late = encode_epoch(new_epoch(5.0))
        assert not client.replace(EPOCH, late, found[1].condition, turn)
        assert tier.epoch() == present
        tier.close()

    def test_a_large_object_is_read_in_pieces(self, tier: SharedTier) -> None:
        for nbytes in (RANGE_BYTES - PAGE, RANGE_BYTES, RANGE_BYTES + PAGE, 2 * RANGE_BYTES + PAGE):
            data = filled(nbytes, nbytes)
            assert write(tier, [(name(1), data)]) == [HIT]
            for room in (nbytes, nbytes + PAGE, 3 * RANGE_BYTES):
                into = empty(room)
                assert tier.read([name(1)], [into]) == [nbytes]
                assert into[:nbytes] == data
                assert not any(into[nbytes:][:PAGE])
            assert tier.read([name(1)], [empty(nbytes - PAGE)]) == [FAILED]

    def test_pieces_are_of_one_object(self, tier: SharedTier, other: SharedTier) -> None:
        nbytes, stop = RANGE_BYTES + 16 * PAGE, threading.Event()
        wanted = [filled(nbytes, seed) for seed in range(2)]
        write(tier, [(name(1), wanted[0])])

        def change() -> None:
            for i in range(1000):
                if stop.is_set():
                    return
                write(other, [(name(1), wanted[i % 2])])

        with ThreadPoolExecutor(1) as threads:
            changes = threads.submit(change)
            into, whole = empty(nbytes), 0
            for _ in range(8):
                (answer,) = tier.read([name(1)], [into])
                assert answer in (nbytes, FAILED)
                if answer == nbytes:
                    whole += 1
                    assert into in wanted
            stop.set()
            changes.result()
        assert tier.read([name(1)], [into]) == [nbytes]

    def test_a_condition_is_of_one_version(self, place: str) -> None:
        tier = self.make_tier(self.server, place)
        client, turn = tier._client, tier._client.turn()
        client.put("one", [b"first"], turn)
        head = client.head("one", turn)
        assert head is not None
        client.put("one", [b"second"], turn)
        with pytest.raises(PreconditionError):
            client.get("one", turn, (0, 3), head.condition)
        tier.close()

    def test_what_is_empty_or_no_epoch_is_refused(self, place: str) -> None:
        tier = self.make_tier(self.server, place)
        turn = tier._client.turn()
        tier._client.put(path_of(name(1)), [b""], turn)
        assert tier.read([name(1)], [empty(PAGE)]) == [FAILED]
        tier._client.put(EPOCH, [b"kvstrata-epoch 9 what\n"], turn)
        with pytest.raises(TierUnavailable, match=f"{place}/epoch holds"):
            tier.epoch()
        tier.close()

    def test_forgetting_goes_on_in_upkeep(
        self, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvstrata.tiers.object_store.tier.REMOVE_BATCH", 10)
        tier, other = (self.make_tier(self.server, place, None) for _ in range(2))
        old = tier.epoch().number
        names = [name(i, old) for i in range(60)]
        write(tier, [(one, filled(PAGE, 1)) for one in names])
        tier.begin_epoch()
        monkeypatch.setattr("kvstrata.tiers.object_store.client.Turn.left", _Few(3))
        assert tier.forget(old) == 30
        assert has(other, names).count(HIT) == 30
        monkeypatch.undo()
        tier.upkeep()
        assert HIT not in has(other, names)
        for one in (tier, other):
            one.close()


class _Few:
    """In the place of a property: true so many times."""

    def __init__(self, times: int) -> None:
        self._times = times

    def __get__(self, instance: object, owner: object) -> bool:
        self._times -= 1
        return self._times >= 0


class TestOnSeaweedFS(OfThisTier, SharedTierContract):
    outlives: ClassVar[bool] = True
    server: SeaweedFS

    def start_server(self, folder: Path) -> SeaweedFS:
        return SeaweedFS(folder)

    def make_tier(
        self, server: SeaweedFS, place: str, capacity_bytes: int | None = 1 << 40
    ) -> ObjectStoreTier:
        return in_s3(server.endpoint, place, capacity_bytes=capacity_bytes)

    @pytest.fixture
    def tier(self, place: str, request: pytest.FixtureRequest) -> Iterator[SharedTier]:
        about_faults = "server" in request.node.name
        timeout_s = SHORT_S if about_faults else TIMEOUT_S
        tier = in_s3(self.server.endpoint, place, timeout_s=timeout_s)
        yield tier
        tier.close()

    # what is wrong is said, with what to do

    def test_no_such_bucket(self) -> None:
        tier = in_s3(self.server.endpoint, bucket="elsewhere")
        with pytest.raises(TierUnavailable, match="no such bucket; make it, or correct object_sto"):
            tier.epoch()
        with pytest.raises(TierUnavailable, match="no such bucket"):
            write(tier, [(name(1), filled(PAGE, 1))])
        tier.close()

    @pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    def test_wrong_credentials(
        self, variable: str, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, "wrong")
        tier = in_s3(self.server.endpoint, place)
        for verb in (
            tier.epoch,
            lambda: tier.stat([name(1)]),
            lambda: tier.read([name(1)], [empty(PAGE)]),
            lambda: write(tier, [(name(1), filled(PAGE, 1))]),
            lambda: tier.forget(1),
        ):
            with pytest.raises(TierUnavailable, match="check AWS_ACCESS_KEY_ID"):
                verb()
        tier.close()


class Folder(Ground):
    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None:
        pass


class TestInAFolder(OfThisTier, SharedStoreContract):
    def start_server(self, folder: Path) -> Folder:
        return Folder(folder)

    def make_tier(
        self, server: Folder, place: str, capacity_bytes: int | None = 1 << 40
    ) -> ObjectStoreTier:
        (server.path / place).mkdir(exist_ok=True)
        return ObjectStoreTier(f"file://{server.path / place}", capacity_bytes=capacity_bytes)

    def test_no_empty_folder_is_left_of_what_is_deleted(self, place: str) -> None:
        """Or each namespace and epoch of the past would leave one."""
        tier = self.make_tier(self.server, place)
        assert write(tier, [(name(1), filled(PAGE, 1))]) == [HIT]
        folder = (self.server.path / place / path_of(name(1))).parent
        assert folder.is_dir()
        assert tier.delete([name(1)]) == [HIT]
        assert not folder.exists()
        tier.close()


def test_names_and_paths() -> None:
    path = path_of(bytes(range(60)))
    assert path == f"0001020304050607/08090a0b0c0d0e0f/{bytes(range(16, 60)).hex()}"
    assert name_of(path) == bytes(range(60))
    for foreign in ("epoch", "uses/1-2", path.upper(), path + "0", path[:34], "a/" + path):
        assert name_of(foreign) is None
