"""What an object store tier makes of answers, of folders and of configurations that are wrong."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.support.object_stores import SHORT_S, in_s3, let_in

from kvstrata.config import load_config
from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.testing.shared import name
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
from kvstrata.tiers.object_store.client import ObjectClient
from kvstrata.tiers.object_store.folder import locked
from kvstrata.tiers.object_store.paths import path_of
from kvstrata.tiers.object_store.tier import ObjectStoreTier


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    let_in(monkeypatch)


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
    """A store that answers each request in the same way, after a delay but for the first
    ``at_once``, and counts how many it has at once."""

    protocol_version = "HTTP/1.1"
    status, body, delay_s, at_once = 404, b"", 0.0, 0
    lock = threading.Lock()
    count = now = most = 0

    def answer(self) -> None:
        cls = type(self)
        with cls.lock:
            cls.count += 1
            waits = cls.count > self.at_once
            cls.now += 1
            cls.most = max(cls.most, cls.now)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.delay_s if waits else 0)
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
    handler.status, handler.delay_s, handler.at_once = 403, 0.3, 2
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
    tier = part.open(None)
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
