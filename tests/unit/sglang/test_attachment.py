"""The node for SGLang's threads: there or not, waited for by none, let go of after the last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.config import Config, load_config
from kvstrata.connectors.attachment import Attachment
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.process.run import bind
from kvstrata.wire.client import NodeClient
from kvstrata.wire.sockets import socket_path

PATIENCE_S = 20.0


class Place:
    """A node behind a socket, which may go and come back."""

    def __init__(self, folder: Path) -> None:
        self.config: Config = load_config(environ={}, overrides={
            "node": f"unix:{folder}/node.sock", "host.capacity": "4MiB",
            "secret_file": str(folder / "secret"),
        })  # fmt: skip
        self.node: InProcessNode | None = None
        self.left: list[NodeClient] = []

    def begin(self) -> None:
        node = self.node = InProcessNode(self.config)
        node.run(lambda: node.server.listen(bind(socket_path(self.config))))

    def end(self) -> None:
        if self.node is not None:
            self.node.close()
            socket_path(self.config).unlink()
            self.node = None

    def attachment(self) -> Attachment:
        return Attachment(self.config, "test", self.left.append)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.end()


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_one(attachment: Attachment) -> bool:
    with attachment.client() as client:
        if client is not None:
            client.look()
        return client is not None and client.alive


def test_a_node_that_is_there_is_had_by_all_threads(place: Place) -> None:
    place.begin()
    attachment = place.attachment()
    attachment.wait(PATIENCE_S)
    with attachment.client() as one, attachment.client() as other:
        assert one is not None
        assert one is other
        assert one.status()["leases"]["count"] == 0
    attachment.close()
    attachment.close()
    assert not one.alive


def test_a_node_that_is_not_there_is_waited_for_by_nobody(place: Place) -> None:
    attachment = place.attachment()
    attachment.wait(PATIENCE_S)
    began = time.monotonic()
    assert not has_one(attachment)
    assert time.monotonic() - began < 1.0
    place.begin()
    eventually(lambda: has_one(attachment))
    attachment.close()


def test_a_node_that_has_gone_is_told_and_another_is_found(place: Place) -> None:
    place.begin()
    attachment = place.attachment()
    attachment.wait(PATIENCE_S)
    with attachment.client() as first:
        assert first is not None
        place.end()
        eventually(lambda: not has_one(attachment))
        # Its memory stays mapped for who is reading it.
        assert place.left == []
        assert first.pool.view(0, 16) is not None
        with attachment.client() as second:
            assert second is None
    place.begin()
    eventually(lambda: has_one(attachment))
    assert place.left == [first]
    attachment.close()


def test_what_is_closed_in_a_read_ends_with_the_read(place: Place) -> None:
    place.begin()
    attachment = place.attachment()
    attachment.wait(PATIENCE_S)
    inside, go_on = threading.Event(), threading.Event()
    alive: list[bool] = []
    clients: list[NodeClient] = []

    def read() -> None:
        with attachment.client() as client:
            assert client is not None
            clients.append(client)
            inside.set()
            go_on.wait(PATIENCE_S)
            alive.append(client.alive)

    thread = threading.Thread(target=read)
    thread.start()
    inside.wait(PATIENCE_S)
    attachment.close()
    assert not has_one(attachment), "nobody else gets it any more"
    assert clients[0].alive
    go_on.set()
    thread.join()
    assert alive == [True]
    assert not clients[0].alive, "the last who used it has hung up"
