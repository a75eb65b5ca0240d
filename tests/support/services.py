"""Two nodes as processes of their own, each other's peers, on a network of their own; for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.attached import Attached, secret_in
from tests.support.networks import MTU, Network
from tests.support.nodes import chunk_keys

from kvstrata.config import load_config
from kvstrata.config.network import TRUSTED
from kvstrata.wire.launch import connect

PORT = 7788
NBYTES = 250_000
MARGIN_S = 3.0
"""What a busy machine may take beyond a deadline."""


class Service(Attached):
    """A node in a process of its own, at one end of the network, and a client of it."""

    def __init__(self, network: Network, folder: Path, end: int, transport: str) -> None:
        mine, other = network.HOSTS[end], network.HOSTS[1 - end]
        at = folder / f"{end}.sock"
        environ = {one: value for one, value in os.environ.items() if "KVSTRATA" not in one}
        environ |= {
            "KVSTRATA_HOST_CAPACITY": "64MiB",
            "KVSTRATA_SECRET_FILE": str(secret_in(folder)),
            "KVSTRATA_NETWORK_LISTEN": f"{mine}:{PORT}",
            "KVSTRATA_NETWORK_TRUSTED": TRUSTED,
            "KVSTRATA_PEER_NODES": f"{other}:{PORT}",
            "KVSTRATA_NETWORK_TRANSPORT": transport,
            "KVSTRATA_PLANNER": "off",
            # Over this network, though both could reach into each other's memory.
            "UCX_TLS": "tcp",
            "UCX_NET_DEVICES": network.devices[end],
        }
        code = "from kvstrata.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", "--socket", f"unix:{at}"]
        with open(folder / f"{end}.log", "wb") as log:
            self.process = subprocess.Popen(
                network.inside(end) + command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("serving on "):
                break
        overrides = {"node": f"unix:{at}", "secret_file": environ["KVSTRATA_SECRET_FILE"]}
        super().__init__(connect(load_config(environ={}, overrides=overrides)), NBYTES)

    def cold(self) -> None:
        """Forget all that it has."""
        self.client.clear()

    def patiently(self, keys: list[bytes], timeout_s: float = 20.0) -> None:
        """Load all of it, in as many requests as a bad network takes; each is right or a miss."""
        self.until(lambda: len(self.get(keys)) == len(keys), timeout_s)

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.communicate()


Pair = tuple[Service, Service]


@contextlib.contextmanager
def two_nodes(transport: str = "tcp") -> Iterator[tuple[Network, Pair]]:
    """Two nodes that are each other's peers, and have heard of each other; and their network."""
    with contextlib.ExitStack() as ends:
        # A path short enough for a socket's.
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kv-")))
        network = ends.enter_context(contextlib.closing(Network()))
        with ThreadPoolExecutor(2) as threads:
            a, b = threads.map(lambda end: Service(network, folder, end, transport), range(2))
        for one in (a, b):
            ends.callback(one.close)
        for one in (a, b):
            one.heard(30.0)
        yield network, (a, b)


KEYS = chunk_keys(12)


def cut_short(network: Network, pair: Pair, strike: Callable[[], None]) -> float:
    """Do something in the middle of a load; how long that load took.

    What did not come is stored then, and is there.
    """
    a, b = pair
    a.store(KEYS)
    network.link.rate = 2e6
    before, struck = network.num_carried, threading.Event()

    def wait() -> None:
        while network.num_carried < before + len(KEYS) * NBYTES // MTU // 4:
            time.sleep(0.005)
        strike()
        struck.set()

    threading.Thread(target=wait).start()
    came: list[int] = []
    while not struck.is_set():
        b.cold()
        begun = time.monotonic()
        came = b.get(KEYS)
    took = time.monotonic() - begun
    assert len(came) < len(KEYS)
    b.store(KEYS)
    assert b.get(KEYS) == [0] * len(KEYS)
    return took
