"""The object store tier, against a real S3 server and in a folder: its contract, and its errors."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from obstore.exceptions import PreconditionError

from kvstrata.config import load_config
from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.testing.servers.seaweedfs import BUCKET, KEY, SECRET, SeaweedFS
from kvstrata.testing.shared import Ground, SharedStoreContract, SharedTierContract, name
from kvstrata.testing.stores import (
    FAILED,
    HIT,
    MISS,
    PAGE,
    empty,
    filled,
    has,
    put,
    read_one,
    write,
)
from kvstrata.tiers.base import SharedTier
from kvstrata.tiers.epochs import encode_epoch, new_epoch
from kvstrata.tiers.object_store.client import ObjectClient
from kvstrata.tiers.object_store.folder import locked
from kvstrata.tiers.object_store.paths import EPOCH, name_of, path_of
from kvstrata.tiers.object_store.tier import RANGE_BYTES, ObjectStoreTier

TIMEOUT_S = 6.0
"""Of a call; of those who write one object on a condition SeaweedFS lets some wait for seconds."""
SHORT_S = 3.0
"""Where nobody answers."""


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def in_s3(
    endpoint: str, place: str = "", bucket: str = BUCKET, timeout_s: float = TIMEOUT_S
) -> ObjectStoreTier:
    return ObjectStoreTier(
        f"s3://{bucket}/{place}", capacity_bytes=1 << 40, endpoint=endpoint, timeout_s=timeout_s
    )


class OfThisTier(SharedStoreContract):
    """What holds in a store and in a folder, and is not for every shared tier."""

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
        assert isinstance(tier, ObjectStoreTier)
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
        assert isinstance(tier, ObjectStoreTier)
        client, turn = tier._client, tier._client.turn()
        client.put("one", [b"first"], turn)
        head = client.head("one", turn)
        assert head is not None
        client.put("one", [b"second"], turn)
        with pytest.raises(PreconditionError):
            client.get("one", 0, 3, turn, head.condition)
        tier.close()

    def test_what_is_empty_or_no_epoch_is_refused(self, place: str) -> None:
        tier = self.make_tier(self.server, place)
        assert isinstance(tier, ObjectStoreTier)
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
        tier, other = (self.make_tier(self.server, place) for _ in range(2))
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

    def make_tier(self, server: SeaweedFS, place: str) -> SharedTier:
        return in_s3(server.endpoint, place)

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

    def make_tier(self, server: Folder, place: str) -> SharedTier:
        (server.path / place).mkdir(exist_ok=True)
        return ObjectStoreTier(f"file://{server.path / place}", capacity_bytes=1 << 40)


def test_names_and_paths() -> None:
    path = path_of(bytes(range(60)))
    assert path == f"0001020304050607/08090a0b0c0d0e0f/{bytes(range(16, 60)).hex()}"
    assert name_of(path) == bytes(range(60))
    for foreign in ("epoch", "uses/1-2", path.upper(), path + "0", path[:34], "a/" + path):
        assert name_of(foreign) is None


def test_nobody_answers() -> None:
    tier = in_s3("http://127.0.0.1:1", timeout_s=SHORT_S)
    with pytest.raises(TierUnavailable, match=r"refused.*; is the endpoint right"):
        tier.epoch()
    tier.close()


def test_a_folder_is_not_made(tmp_path: Path) -> None:
    """It would be made where a mount is missing, and every machine would have its own."""
    with pytest.raises(
        ConfigError, match=r"object_store\.url.*make the folder, below where its fi"
    ):
        ObjectStoreTier(f"file://{tmp_path}/missing", capacity_bytes=None)
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_lock_is_held(tmp_path: Path) -> None:
    tier = ObjectStoreTier(f"file://{tmp_path}", capacity_bytes=None, timeout_s=0.2)
    tier.epoch()
    with (
        locked(tmp_path, 1.0),
        pytest.raises(TierUnavailable, match=r"held by somebody for 0\.2 s"),
    ):
        tier.begin_epoch()
    tier.begin_epoch()
    tier.close()


def test_a_folder_that_is_full(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        tier = ObjectStoreTier(f"file://{tmp_path}", capacity_bytes=None)
        assert write(tier, [(name(1), filled(4 * PAGE, 1))]) == [HIT]
        with pytest.raises(TierFull, match="has no room"):
            write(tier, [(name(2), filled(512 * PAGE, 2))])
        assert has(tier, [name(1), name(2)]) == [HIT, MISS]
        assert read_one(tier, name(1), 4 * PAGE) == (HIT, bytes(filled(4 * PAGE, 1)))
        tier.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


class Answering(BaseHTTPRequestHandler):
    """A store that answers each request in the same way, and counts how many it has at once."""

    protocol_version = "HTTP/1.1"
    status, body, delay_s = 404, b"", 0.0
    lock = threading.Lock()
    now = most = 0

    def answer(self) -> None:
        cls = type(self)
        with cls.lock:
            cls.now += 1
            cls.most = max(cls.most, cls.now)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.delay_s)
        with cls.lock:
            cls.now -= 1
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)

    do_GET = do_HEAD = do_PUT = answer

    def log_message(self, *arguments: object) -> None:
        pass


class Listening(ThreadingHTTPServer):
    request_queue_size = 64


@pytest.fixture
def answering() -> Iterator[tuple[type[Answering], str]]:
    handler = type("OfThisTest", (Answering,), {})
    server = Listening(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (507, "XMinioStorageFull", TierFull),
        (403, "QuotaExceeded", TierFull),
        (403, "AccessDenied", TierUnavailable),
        (500, "InternalError", TierUnavailable),
    ],
)
def test_what_a_store_answers(
    status: int, code: str, expected: type, answering: tuple[type[Answering], str]
) -> None:
    handler, endpoint = answering
    handler.status = status
    handler.body = f'<?xml version="1.0"?><Error><Code>{code}</Code></Error>'.encode()
    tier = in_s3(endpoint, timeout_s=SHORT_S)
    with pytest.raises(TierUnavailable, match=code) as caught:
        write(tier, [(name(1), filled(PAGE, 1))])
    assert type(caught.value) is expected or expected is TierUnavailable
    assert isinstance(caught.value, TierFull) == (expected is TierFull)
    with pytest.raises(TierUnavailable) as caught:  # only a write finds a store full
        tier.read([name(1)], [empty(PAGE)])
    assert not isinstance(caught.value, TierFull)
    tier.close()


def test_questions_are_asked_side_by_side(answering: tuple[type[Answering], str]) -> None:
    handler, endpoint = answering
    handler.delay_s = 0.1
    tier = in_s3(endpoint)
    names = [name(i) for i in range(16)]
    begun = time.monotonic()
    assert tier.stat(names) == [MISS] * 16
    assert time.monotonic() - begun < 0.8, "one after the other they take 1.6 s"
    assert tier.stat([name(i) for i in range(40)]) == [MISS] * 40
    assert 2 <= handler.most <= tier.limits.round_objects == 16
    tier.close()


def test_a_store_that_is_slow_ends_a_batch(answering: tuple[type[Answering], str]) -> None:
    handler, endpoint = answering
    handler.delay_s = 0.6
    tier = in_s3(endpoint, timeout_s=SHORT_S)
    begun = time.monotonic()
    with pytest.raises(TierUnavailable, match="too slow"):
        tier.stat([name(i) for i in range(64)])
    assert time.monotonic() - begun < tier.limits.timeout_s
    tier.close()


def test_what_fails_leaves_the_buffers_alone(answering: tuple[type[Answering], str]) -> None:
    """A verb that raises does so when none of its requests is under way any more."""
    handler, endpoint = answering
    handler.status, handler.delay_s = 403, 0.3
    tier = in_s3(endpoint)
    puts = [put(name(i), filled(PAGE, i)) for i in range(4)]
    with pytest.raises(TierUnavailable):
        tier.write(puts)
    assert handler.now == 0
    tier.close()


def test_bytes_of_random_answers(answering: tuple[type[Answering], str]) -> None:
    """What comes back may be anything; it is a miss, a failure or an unavailable store."""
    handler, endpoint = answering
    draw = random.Random(0)
    tier = in_s3(endpoint)
    for status in (200, 204, 206, 301, 404, 416):
        handler.status, handler.body = status, b"" if status == 204 else draw.randbytes(2 * PAGE)
        try:
            assert tier.read([name(1)], [empty(PAGE)]) in ([MISS], [FAILED]), status
            tier.stat([name(1)])
        except TierUnavailable:
            pass
    tier.close()


# configuration


def load(**options: object) -> ObjectStoreTier:
    overrides = {f"object_store.{key}": value for key, value in options.items()}
    part = load_config(environ={}, overrides=overrides).tier("object_store")
    assert part is not None
    tier = part.open()
    assert isinstance(tier, ObjectStoreTier)
    return tier


def test_what_is_configured_arrives(tmp_path: Path) -> None:
    tier = load(url=f"file://{tmp_path}", capacity="1GiB", epoch_every="7s")
    assert tier.capacity_bytes == 1 << 30
    assert tier.epoch().lasts_s == 7.0
    tier.close()


def test_a_store_that_keeps_its_own_bounds(tmp_path: Path) -> None:
    tier = load(url=f"file://{tmp_path}", capacity="the store's")
    write(tier, [(name(1, tier.epoch().number), filled(PAGE, 1)), (name(1), filled(PAGE, 1))])
    tier.touch([name(1)])
    tier.upkeep()
    assert not tier.sweeps
    kept = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert kept == {
        "epoch", path_of(name(1, tier.epoch().number)), path_of(name(1))
    }, "no lease, no notes, and nothing swept"  # fmt: skip
    tier.close()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"url": "ftp://a/b"}, "object_store.url: 'ftp://a/b' is no such URL"),
        ({"url": "s3://key:secret@bucket/a"}, "is no such URL"),
        ({"url": "file://relative"}, "is no such URL"),
        ({"url": "s3://bucket"}, "object_store.capacity: missing"),
        ({"url": "s3://bucket", "capacity": "mine"}, 'or "the store\'s"'),
        ({"url": "gs://b", "capacity": "1GiB", "endpoint": "http://a:1"}, "is for s3:// alone"),
        ({"url": "az://b", "capacity": "1GiB", "region": "eu"}, "object_store.region: is for s3"),
        ({"url": "s3://b", "capacity": "1GiB", "endpoint": "a:1"}, "'a:1' is no endpoint"),
        ({"url": "s3://b", "capacity": "1GiB", "coarser": "int4"}, "load_target: missing"),
    ],
)
def test_bad_configuration(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**options)
    assert problem in str(caught.value)


def test_an_azure_store_without_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(
        ConfigError, match=r"object_store\.url: az://container/a cannot be used.*ount"
    ):
        load(url="az://container/a", capacity="1GiB")


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/a/b", "gs://bucket/a", "az://box/a"])
def test_every_kind_of_store_opens(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    client = ObjectClient(url, 1.0)
    assert client.folder is None
