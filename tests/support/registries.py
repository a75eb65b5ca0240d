"""Nodes of a fleet whose registry is a real Redis, for tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.attached import Attached, secret_in

from kvstrata.config import load_config
from kvstrata.errors import KVStrataError
from kvstrata.fleet import commands
from kvstrata.fleet.members import Member
from kvstrata.fleet.registry import Registry
from kvstrata.node.fleet import membership
from kvstrata.node.fleet.membership import Membership
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.testing.servers.redis import RedisServer
from kvstrata.tiers.redis.address import parse_address
from kvstrata.tiers.redis.client import Client

LASTS_S, SHORT_S = 30.0, 2.0
"""Of a registration, in tests; the short one where it is to run out."""
TICK_S = 0.05


class Node(Attached):
    """A node of the fleet, in this process, and a client of it."""

    def __init__(self, folder: Path, url: str, name: str, **options: Any) -> None:
        overrides: dict[str, Any] = {
            "host.capacity": "1MiB",
            "host.verify_every": 0,
            "leases.per_client": "80%",
            "planner": "off",
            "secret_file": str(secret_in(folder)),
            "fleet.registry": url,
            "fleet.name": name,
            **options,
        }
        self.name = name
        self.inprocess = InProcessNode(load_config(environ={}, overrides=overrides))
        self.closed = False
        super().__init__(self.inprocess.connect())

    @property
    def fleet(self) -> Membership:
        assert self.inprocess.fleet is not None
        return self.inprocess.fleet

    @property
    def good(self) -> bool:
        return self.fleet.standing.good()

    def has(self, keys: Sequence[bytes]) -> int:
        """How many of these chunks the node says are in its own tiers."""
        return len(keys) - self.client.lookup(keys, [0]).count(255)

    def told(self) -> None:
        """Wait until the registry has heard of all that it holds."""
        self.until(lambda: not self.fleet.telling.behind)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.inprocess.check_integrity()
            self.client.close()
            self.inprocess.close()


class Fleet:
    """A registry, and nodes that are closed with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = RedisServer(folder / "registry")
        self.registry = Registry(Client(parse_address(self.server.url), 8, 2.0), "kvstrata")
        self._nodes = contextlib.ExitStack()

    def join(self, name: str, **options: Any) -> Node:
        node = Node(self.folder, self.server.url, name, **options)
        self._nodes.callback(node.close)
        return node

    def members(self) -> dict[str, Member]:
        return {one.name: one for one in self.registry.members()}

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, AssertionError):
            self.server.resume()
        self._nodes.close()
        self.registry.close()
        self.server.close()


@contextlib.contextmanager
def fleet_in(folder: Path, lasts_s: float = LASTS_S) -> Iterator[Fleet]:
    """A fleet without nodes yet, whose registrations last so long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "LASTS_S", lasts_s)
        patch.setattr(commands, "LASTS_S", 0.0)  # a new registry is waited out where that matters
        patch.setattr(membership, "TICKS", lasts_s / TICK_S)
        fleet = Fleet(folder)
        try:
            yield fleet
        finally:
            fleet.close()


def until(true: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(KVStrataError):
            if true():
                return
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


class Line:
    """A TCP line to a server on loopback that can be cut: nothing passes, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._whole = threading.Event()
        self._whole.set()
        self._closed = False
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self._closed = True
        self._whole.set()
        for one in [self._listener, *self._ends]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                continue
            self._ends += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                self._whole.wait()
                other.sendall(data)
            other.shutdown(socket.SHUT_RDWR)
