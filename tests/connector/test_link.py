"""The way to the node: never in the engine's way, one client at a time, again and again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstrata.config import Config
from kvstrata.connectors import link as module
from kvstrata.connectors.link import Link
from kvstrata.errors import ConfigError, NodeUnavailable

PATIENCE_S = 20.0


class Client:
    """As much of a client as a link touches."""

    def __init__(self) -> None:
        self.hello: Any = type("Hello", (), {"pid": 1, "capacity_bytes": 1 << 30})
        self.pool: Any = type("Pool", (), {"populate": staticmethod(lambda: None)})
        self.closed = False

    def close(self) -> None:
        self.closed = True


class World:
    """Where clients come from: each attempt meets what was put up for it."""

    def __init__(self) -> None:
        self.outcomes: list[Callable[[], Client]] = []
        self.clients: list[Client] = []
        self.num_attempts = 0

    def connect(self, config: Config) -> Client:
        self.num_attempts += 1
        outcome = self.outcomes.pop(0) if self.outcomes else Client
        client = outcome()
        self.clients.append(client)
        return client


def refuse(error: Exception) -> Callable[[], Client]:
    def outcome() -> Client:
        raise error

    return outcome


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(module, "connect", made.connect)
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.001)
    return made


@pytest.fixture
def link(world: World) -> Iterator[Link]:
    made = Link(Config(), "test")
    yield made
    made.close()


def take(link: Link) -> Client:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        client: Any = link.take()
        if client is not None:
            assert isinstance(client, Client)
            return client
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_client_is_handed_out_once(world: World, link: Link) -> None:
    link.start()
    link.wait(PATIENCE_S)
    assert take(link) is world.clients[0]
    assert link.take() is None
    link.start()
    assert take(link) is world.clients[1]


def test_it_tries_until_it_succeeds_and_complains_once(
    world: World, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [NodeUnavailable("nobody"), OSError("no fd"), ConfigError("node", "not ours")]
    world.outcomes = [refuse(error) for error in errors]
    link.start()
    take(link)
    assert world.num_attempts == 4
    complaints = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(complaints) == 1
    assert "nobody" in complaints[0].getMessage()


def test_a_start_does_not_wait_for_a_node_that_is_not_there(world: World, link: Link) -> None:
    world.outcomes = [refuse(NodeUnavailable("nobody"))] * 10_000
    link.start()
    begun = time.monotonic()
    link.wait(PATIENCE_S)
    assert time.monotonic() - begun < PATIENCE_S / 2, "the first failure ends the wait"
    assert link.take() is None


def test_a_bug_does_not_make_anybody_wait_and_is_told_once(
    world: World, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()

    def at_last() -> Client:
        gate.wait(PATIENCE_S)
        return Client()

    world.outcomes = [*[refuse(ZeroDivisionError())] * (module.MOST_BUGS - 1), at_last]
    link.start()
    begun = time.monotonic()
    link.wait(PATIENCE_S)
    assert time.monotonic() - begun < PATIENCE_S / 2
    assert link.take() is None
    gate.set()
    take(link)
    assert world.num_attempts == module.MOST_BUGS
    (told,) = [record for record in caplog.records if record.exc_info]
    assert "bug" in told.getMessage()


def test_what_is_a_bug_each_time_ends(
    world: World, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    world.outcomes = [refuse(ZeroDivisionError())] * 100
    link.start()
    deadline = time.monotonic() + PATIENCE_S
    while "not tried again" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    link.start()
    assert link.take() is None
    assert world.num_attempts == module.MOST_BUGS


def test_a_client_whose_memory_cannot_be_had_is_closed(world: World, link: Link) -> None:
    bad = Client()
    bad.pool.populate = staticmethod(refuse(OSError("no memory")))
    world.outcomes = [lambda: bad]
    link.start()
    assert take(link) is world.clients[1]
    assert bad.closed


def test_however_often_it_is_started_there_is_one_client(world: World, link: Link) -> None:
    """The engine starts it in every step without a node, also while an attempt is ending."""
    for _ in range(100):
        client = None
        while client is None:
            link.start()
            client = link.take()
    link.start()
    take(link)
    assert len(world.clients) <= 101 + 1
    deadline = time.monotonic() + PATIENCE_S
    while threading.active_count() > 1 and any(
        thread.name == "kvstrata-attach" for thread in threading.enumerate()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert link.take() is None, "a client that nobody asked for would never be closed"


def test_a_client_that_comes_after_the_end_is_closed(world: World) -> None:
    gate = threading.Event()

    def late() -> Client:
        gate.wait(PATIENCE_S)
        return Client()

    world.outcomes = [late]
    link = Link(Config(), "test")
    link.start()
    link.close()
    gate.set()
    deadline = time.monotonic() + PATIENCE_S
    while not (world.clients and world.clients[0].closed):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert link.take() is None
    link.start()
    assert world.num_attempts == 1, "closed is closed"
