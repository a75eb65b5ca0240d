"""A fleet of real processes: nodes that are killed, and nodes that end when they are drained."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.attached import Attached, secret_in
from tests.support.nodes import chunk_keys
from tests.support.registries import Fleet, fleet_in, until

from kvstrata.config import load_config
from kvstrata.fleet import commands
from kvstrata.testing.servers.redis import installed
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p
from kvstrata.wire.launch import connect

pytestmark = pytest.mark.skipif(not installed(), reason="there is no redis-server here")

OLD, NEW = chunk_keys(6), chunk_keys(6, 1)


class Process(Attached):
    """A node of the fleet in a process of its own, with a disk, and a client of it."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        at = fleet.folder / f"{name}.sock"
        options: dict[str, Any] = {
            "node": f"unix:{at}",
            "host.capacity": "1MiB",
            "secret_file": str(secret_in(fleet.folder)),
            "disk.path": str(fleet.folder / f"disk-{name}"),
            "disk.capacity": "2MiB",
            "fleet.registry": fleet.server.url,
            "fleet.name": name,
        }
        sets = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
        with open(fleet.folder / f"{name}.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvstrata.cli", "serve", *sets],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("serving on "):
                break
        super().__init__(connect(load_config(environ={}, overrides=options)))

    def has(self, keys: list[bytes]) -> int:
        return len(keys) - self.client.lookup(keys, [0]).count(255)

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    # A path short enough for a socket's.
    with tempfile.TemporaryDirectory(prefix="kv-") as folder, fleet_in(Path(folder)) as fleet:
        yield fleet


def test_a_node_that_is_killed_before_it_confirms_serves_nothing_of_before(fleet: Fleet) -> None:
    with contextlib.ExitStack() as ends:
        nodes = {name: Process(fleet, name) for name in "ab"}
        for node in nodes.values():
            ends.callback(node.kill)
            node.store(OLD)
            node.client.flush()
        nodes["b"].process.send_signal(signal.SIGSTOP)  # so that it cannot have heard of it
        posted = commands.post(fleet.registry, p.Clear(0), 60.0)
        nodes["b"].kill()
        answers = commands.wait(fleet.registry, posted, 60.0)
        assert answers.done
        assert answers.gone == ["b"]
        assert nodes["a"].has(OLD) == 0
        back = Process(fleet, "b")
        ends.callback(back.kill)
        assert back.has(OLD) == 0
        back.store(NEW)
        back.client.flush()
        back.kill()
        again = Process(fleet, "b")
        ends.callback(again.kill)
        until(lambda: again.has(NEW) == len(NEW))


def test_nodes_end_one_after_the_other_when_they_are_drained(fleet: Fleet) -> None:
    with contextlib.ExitStack() as ends:
        nodes = {name: Process(fleet, name) for name in "ab"}
        for node in nodes.values():
            ends.callback(node.kill)
            node.store(OLD)
        alive: list[set[str]] = []

        def tell(name: str, reply: p.Reply) -> None:
            alive.append(set(fleet.members()))

        answers = commands.one_by_one(fleet.registry, o.Drain(0, True), 60.0, tell)
        assert answers.done
        assert {*answers.answered, *answers.gone} == {"a", "b"}
        assert all("b" in one for one in alive[:1])
        for node in nodes.values():
            assert node.process.wait(30.0) == 0
        assert fleet.members() == {}
