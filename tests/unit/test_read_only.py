"""A node that may only read a shared store reads it, says so once, and leaves it as it is."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.support.nodes import clear, flush, until
from tests.support.object_stores import let_in
from tests.support.real_nodes import KEYS, ME, chunk, load_shared, store
from tests.support.redis_tiers import rule_on_the_page

from kvstrata.cli import checks, doctor
from kvstrata.config import load_config
from kvstrata.errors import ReadOnly
from kvstrata.node.node import Node
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.process.run import bind
from kvstrata.node.service.health import ASK_AGAIN_S
from kvstrata.node.service.link_test import LinkTest
from kvstrata.testing.clock import ManualClock
from kvstrata.testing.servers.redis import RedisServer, installed
from kvstrata.testing.servers.seaweedfs import BUCKET, KEY, READER_KEY, SeaweedFS
from kvstrata.wire import protocol as p
from kvstrata.wire.sockets import socket_path

SHARED = [1] * len(KEYS)
NOBODY = 65534
SECRET = "hunter2"
LONG_ENOUGH_S = 2.5
"""A tier that merely failed would have been tried again after one second, and after two more."""


class Place(NamedTuple):
    """A store, as one who may write to it and one who may not are to reach it.

    Args:
        tier: its name.
        writer, reader: the options of each.
        as_reader: in which the reader lives.
        grant: lets it write from then on.
        said: of the refusal in the status.
    """

    tier: str
    writer: dict[str, Any]
    reader: dict[str, Any]
    as_reader: Callable[[], AbstractContextManager[None]]
    grant: Callable[[], None]
    said: str


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if not installed():
        pytest.skip("there is no redis-server here")
    server = RedisServer(tmp_path_factory.mktemp("redis") / "redis")
    yield server
    server.close()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    server = SeaweedFS(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture
def in_redis(redis_server: RedisServer) -> Iterator[Place]:
    with redis_server.admin() as admin:
        admin.flushall()
        admin.execute_command(*rule_on_the_page(SECRET, "kvstrata-reader"))
        reader = redis_server.url.replace("://", f"://kvstrata-reader:{SECRET}@")

        def grant() -> None:
            admin.execute_command(*rule_on_the_page(SECRET, "kvstrata-reader"), "+@all")

        yield Place(
            "redis", {"url": redis_server.url, "ttl": "1h"}, {"url": reader, "ttl": "1h"},
            nullcontext, grant, "does not let user 'kvstrata-reader' write: ",
        )  # fmt: skip
        admin.acl_deluser("kvstrata-reader")


@pytest.fixture
def in_folder() -> Iterator[Place]:
    """As root another user reads; as anybody else oneself, who has shut the folder."""
    folder = Path(tempfile.mkdtemp(prefix="kvstrata-"))
    folder.chmod(0o755)
    (folder / "store").mkdir()
    root = os.geteuid() == 0

    def modes(folders: int, files: int) -> None:
        for path in [folder / "store", *(folder / "store").rglob("*")]:
            path.chmod(folders if path.is_dir() else files)

    @contextmanager
    def as_reader() -> Iterator[None]:
        modes(0o555, 0o444)
        try:
            if root:
                os.seteuid(NOBODY)
            yield
        finally:
            if root:
                os.seteuid(0)
            modes(0o755, 0o644)

    def grant() -> None:
        if root:
            os.seteuid(0)
        modes(0o777, 0o666)
        if root:
            os.seteuid(NOBODY)

    options = {"url": f"file://{folder / 'store'}", "capacity": "1GiB"}
    said = r"cannot write .*check that this user may read and write the folder"
    yield Place("object_store", options, options, as_reader, grant, said)
    shutil.rmtree(folder)


@pytest.fixture
def in_bucket(bucket: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    let_in(monkeypatch)

    @contextmanager
    def as_reader() -> Iterator[None]:
        let_in(monkeypatch, READER_KEY)
        yield
        let_in(monkeypatch, KEY)

    options = {
        "url": f"s3://{BUCKET}/{tmp_path.name}", "endpoint": bucket.endpoint, "capacity": "1GiB",
    }  # fmt: skip
    said = "cannot write .*get, put and delete its objects"
    return Place("object_store", options, options, as_reader, lambda: None, said)


@pytest.fixture(params=["in_redis", "in_folder", "in_bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


def on_node(
    options: dict[str, Any],
    tier: str,
    test: Callable[[Node], Coroutine[Any, Any, None]],
    clock: ManualClock | None = None,
) -> None:
    overrides = {
        "host.capacity": "16MiB",
        tier: {"lookup_timeout": "5s", "epoch_every": "1s", **options},
    }

    async def main() -> None:
        node = Node.create(load_config(environ={}, overrides=overrides), clock or time.monotonic)
        try:
            await node.start()
            await asyncio.wait_for(test(node), 60)
            node.check_integrity()
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())


def write_all(place: Place) -> None:
    """Have all chunks in the store, by a node that may write."""

    async def test(node: Node) -> None:
        await until(lambda: state(node) == "ok" and node.backings[0]._timed)
        assert store(node) == len(KEYS)
        await flush(node, ME)

    on_node(place.writer, place.tier, test)


def state(node: Node) -> str:
    found: str = node.status(ME, p.Status(1)).state["tiers"][0]["state"]
    return found


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR]


@pytest.fixture
def link_tests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs in which one was tried."""
    tried: list[int] = []
    run = LinkTest.run

    async def noted(self: LinkTest, epoch: int) -> None:
        tried.append(epoch)
        await run(self, epoch)

    monkeypatch.setattr(LinkTest, "run", noted)
    return tried


def test_reads_go_on_and_writes_are_off_with_one_word_of_it(
    place: Place, link_tests: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    write_all(place)
    link_tests.clear()

    async def test(node: Node) -> None:
        await until(lambda: state(node).startswith("read only: "))
        assert re.search(place.said, state(node))
        for _ in range(2):
            tiers, payloads = await load_shared(node)
            assert tiers == SHARED
            assert payloads == [chunk(number) for number in range(len(KEYS))]
            await clear(node, ME, tiers=["host"])
        assert store(node) == len(KEYS)
        await flush(node, ME)
        name = f'write_behind_skipped_total{{tier="{place.tier}",why="tier"}}'
        assert node.counters.snapshot()[name] == len(KEYS)
        await node.backings[0].upkeep()
        await asyncio.sleep(LONG_ENOUGH_S)
        assert state(node).startswith("read only: ")
        assert node.backings[0].readable
        assert len(link_tests) == 1

    with place.as_reader():
        on_node(place.reader, place.tier, test)
    (said,) = errors(caplog)
    assert re.search(f"{place.tier} is only read from now on: .*{place.said}", said)


@pytest.mark.parametrize("place", ["in_redis", "in_folder"], indirect=True)
def test_rights_that_are_granted_later_are_found_out(
    place: Place, link_tests: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_all(place)
    link_tests.clear()
    clock = ManualClock()

    async def test(node: Node) -> None:
        await until(lambda: state(node).startswith("read only: "))
        clock.advance(ASK_AGAIN_S)
        await until(lambda: len(link_tests) == 2 and node.backings[0].readable)
        await until(lambda: not node.backings[0].writable)
        assert state(node).startswith("read only: ")
        place.grant()
        clock.advance(ASK_AGAIN_S - 1)
        await until(lambda: node.backings[0].readable)
        await asyncio.sleep(0.3)
        assert len(link_tests) == 2
        clock.advance(1)
        await until(lambda: state(node) == "ok")
        assert len(link_tests) == 3

    with place.as_reader():
        on_node(place.reader, place.tier, test, clock)
    assert len(errors(caplog)) == 1
    assert f"{place.tier} takes writes again" in caplog.text


def test_a_clear_is_refused_and_changes_nothing(place: Place) -> None:
    write_all(place)

    async def test(node: Node) -> None:
        await until(lambda: state(node).startswith("read only: "))
        for _ in range(2):
            with pytest.raises(ReadOnly, match="is not cleared, since this node may only read it"):
                await clear(node, ME)
            assert (await load_shared(node))[0] == SHARED

    with place.as_reader():
        on_node(place.reader, place.tier, test)


def test_a_store_that_nobody_began_is_waited_for(place: Place) -> None:
    async def test(node: Node) -> None:
        await until(lambda: state(node).startswith("off: "))
        assert re.search(
            f"nobody has begun an epoch there; start a node that may write: .*{place.said}",
            state(node),
        )

    with place.as_reader():
        on_node(place.reader, place.tier, test)


def test_what_is_corrupt_and_cannot_be_removed_is_not_read_again(
    in_redis: Place, redis_server: RedisServer
) -> None:
    write_all(in_redis)
    with redis_server.admin() as admin:
        for key in admin.keys("kvstrata:*"):
            if key != b"kvstrata:epoch":
                admin.setrange(key, 9000, b"something else")

    async def test(node: Node) -> None:
        await until(lambda: state(node).startswith("read only: "))

        def corrupt() -> float:
            return node.counters.snapshot()['corrupt_objects_total{tier="redis"}']

        assert await load_shared(node) == ([], [])
        await until(lambda: corrupt() == len(KEYS))
        assert await load_shared(node) == ([], [])
        assert corrupt() == len(KEYS)

    on_node(in_redis.reader, "redis", test)


@pytest.mark.parametrize("known", ["before", "while it looks", "or later"])
def test_doctor_warns_and_sends_no_canary_there(
    in_redis: Place, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """Whether the node has found out by then, or does so meanwhile."""
    write_all(in_redis)
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        monkeypatch.setenv("XDG_CONFIG_HOME", folder)
        overrides = {
            "node": f"unix:{folder}/node.sock", "host.capacity": "16MiB", "redis": in_redis.reader,
        }  # fmt: skip
        config = load_config(environ={}, overrides=overrides)
        node = InProcessNode(config)
        try:
            node.run(lambda: node.server.listen(bind(socket_path(config))))
            deadline = time.monotonic() + 10.0

            def await_known() -> None:
                while not node.node.backings[0].state.startswith("read only: "):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)

            if known == "before":
                await_known()
            elif known == "while it looks":  # it has the node's status by then
                look = checks.check_past

                def look_late(counters: Mapping[str, float]) -> checks.Check:
                    await_known()
                    return look(counters)

                monkeypatch.setattr(checks, "check_past", look_late)
            found = {check.name: check for check in doctor.examine(config)}
        finally:
            node.close()
    assert found["redis"].result == "warn"
    assert re.search(in_redis.said, found["redis"].message)
    assert found["host read"].result == "ok"
    assert "redis write" not in found
    assert found["clean up"].result == "ok"
    assert not [check for check in found.values() if check.result == "FAIL"]
