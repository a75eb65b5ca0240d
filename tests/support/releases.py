"""Old and new side by side, for tests: the last release as it was, and nodes of other versions."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import unittest.mock
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.attached import Attached

import kvstrata
from kvstrata.config import load_config
from kvstrata.objects import FORMAT_VERSION
from kvstrata.transfer.peers import PEER_VERSION
from kvstrata.wire import protocol
from kvstrata.wire.launch import connect
from kvstrata.wire.protocol import PROTOCOL_VERSION

ARCHIVE = Path(__file__).parent.parent / "releases" / "kvstrata-0.1.0.zip"
"""Its sources as they were released, without what node and connector do not need."""


def unpack(folder: Path) -> Path:
    """The released sources, in a folder; what to import them from."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def serve_released(released: Path, options: Mapping[str, Any]) -> None:
    """Start a node of the last release, on the socket that ``node`` names; it listens then."""
    serving = subprocess.run(
        [sys.executable, "-m", "kvstrata.node.run"],
        input=json.dumps({**options, "linger": "600s"}),
        env={**os.environ, "PYTHONPATH": str(released)},
        cwd="/",
        text=True,
        timeout=60,
        check=False,
    )
    assert serving.returncode == 0, "the old node listens"


def end_node(path: Path, how: signal.Signals = signal.SIGKILL) -> None:
    """End the node of any release that listens on a socket, and wait for that."""
    with socket.socket(socket.AF_UNIX) as connected:
        connected.connect(str(path))
        peer = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, _, _ = struct.unpack("3i", peer)
        pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, how)
        assert select.select([pidfd], [], [], 60)[0], "it ends"
    finally:
        os.close(pidfd)


class Release(NamedTuple):
    """What two releases may differ in, as numbers.

    ``format`` is what it writes: 1, as it was, 2, or 3, which no release of today reads.
    """

    name: str
    protocol: int
    peers: int
    format: int


THIS = Release(kvstrata.__version__, PROTOCOL_VERSION, PEER_VERSION, FORMAT_VERSION)
OLDER = Release("0.1.9", 1, 0, 1)
NEWER = Release("0.3.0", 3, 2, 3)

_SERVE = """
import sys
import kvstrata
from kvstrata import objects
from kvstrata.transfer import peers
from kvstrata.wire import protocol
name, *numbers = sys.argv.pop(1).split()
kvstrata.__version__ = name
protocol.PROTOCOL_VERSION, peers.PEER_VERSION, objects.FORMAT_VERSION = map(int, numbers)
from kvstrata.cli import main
main()
"""


class ReleaseNode(Attached):
    """A node as a service that is of some release by its version numbers, and a client of it.

    Args:
        folder: for its socket and its log; a path short enough for a socket's.
        release: which one.
        options: of the node.
    """

    def __init__(self, folder: Path, release: Release, options: Mapping[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        self.release = release
        self.config = load_config(
            environ={}, overrides={**options, "node": f"unix:{folder}/node.sock"}
        )
        given = [f"--set={name}={value}" for name, value in options.items()]
        words = " ".join(map(str, release))
        socket_of = f"--socket=unix:{folder}/node.sock"
        with open(folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, words, "serve", socket_of, *given],
                env={one: value for one, value in os.environ.items() if "KVSTRATA" not in one},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("serving on "):
                break
        with unittest.mock.patch.object(protocol, "PROTOCOL_VERSION", release.protocol):
            super().__init__(connect(self.config))

    def tier(self, name: str) -> str:
        """The state of one of its tiers, in words."""
        tiers = self.client.status()["tiers"]
        return str(next(tier["state"] for tier in tiers if tier["name"] == name))

    def close(self) -> None:
        """End it as its operator does. Repeatable."""
        self.client.close()
        self.process.terminate()
        self.process.communicate(timeout=60)
