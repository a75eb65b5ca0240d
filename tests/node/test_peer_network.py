"""Peers on a bad network: real nodes in namespaces, a link that delays, loses, limits and breaks.

Whatever the network does, a load brings the right bytes or a miss, within its deadlines, and a peer
that can be reached again is used again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support import networks
from tests.support.attached import Attached, secret_in
from tests.support.networks import Link, Network
from tests.support.nodes import chunk_keys

from kvstrata.config import load_config
from kvstrata.config.network import TRUSTED
from kvstrata.tiers.peer import LONGEST_PAUSE_S, STAT_S, TIMEOUT_S
from kvstrata.wire.launch import connect

WHY_NOT = networks.missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

PORT = 7788
NBYTES = 250_000
MARGIN_S = 3.0
"""What a busy machine may take beyond a deadline."""


class Service(Attached):
    """A node in a process of its own, at one end of the network, and a client of it."""

    def __init__(self, network: Network, folder: Path, end: int) -> None:
        mine, other = network.HOSTS[end], network.HOSTS[1 - end]
        at = folder / f"{end}.sock"
        environ = {one: value for one, value in os.environ.items() if "KVSTRATA" not in one}
        environ |= {
            "KVSTRATA_HOST_CAPACITY": "64MiB",
            "KVSTRATA_SECRET_FILE": str(secret_in(folder)),
            "KVSTRATA_NETWORK_LISTEN": f"{mine}:{PORT}",
            "KVSTRATA_NETWORK_TRUSTED": TRUSTED,
            "KVSTRATA_PEER_NODES": f"{other}:{PORT}",
            "KVSTRATA_PLANNER": "off",
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
def two_nodes() -> Iterator[tuple[Network, Pair]]:
    """Two nodes that are each other's peers, and have heard of each other; and their network."""
    with contextlib.ExitStack() as ends:
        # A path short enough for a socket's.
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kv-")))
        network = ends.enter_context(contextlib.closing(Network()))
        with ThreadPoolExecutor(2) as threads:
            a, b = threads.map(lambda end: Service(network, folder, end), range(2))
        for one in (a, b):
            ends.callback(one.close)
        for one in (a, b):
            one.heard(30.0)
        yield network, (a, b)


@pytest.fixture(scope="module")
def standing() -> Iterator[tuple[Network, Pair]]:
    with two_nodes() as both:
        yield both


@pytest.fixture
def network(standing: tuple[Network, Pair]) -> Iterator[Network]:
    """A network that is as good as new, before and after."""
    network, pair = standing
    yield network
    network.link = Link()
    for one in pair:
        one.cold()
        one.heard(LONGEST_PAUSE_S)


@pytest.fixture
def pair(standing: tuple[Network, Pair], network: Network) -> Pair:
    return standing[1]


KEYS = chunk_keys(12)


@pytest.mark.parametrize("how", ["delay", "loss", "rate", "all"])
def test_a_bad_link_is_slow_and_right(network: Network, pair: Pair, how: str) -> None:
    a, b = pair
    a.store(KEYS)
    if how in ("delay", "all"):
        network.link.delay_s = 0.04
    if how in ("loss", "all"):
        network.link.loss = 0.05
    if how in ("rate", "all"):
        network.link.rate = 3e6
    b.patiently(KEYS)
    assert b.get(KEYS) == [0] * len(KEYS)
    assert network.num_carried > len(KEYS) * NBYTES // networks.MTU, "it did not cross this network"
    assert how not in ("loss", "all") or network.num_dropped > 10


def test_a_partition_in_the_middle_of_a_load(network: Network, pair: Pair) -> None:
    """The load is cut within its deadline; a clear link serves again, without a restart."""
    a, b = pair
    a.store(KEYS)
    network.link.rate = 2e6
    before = network.num_carried
    cut = threading.Timer(0.4, lambda: setattr(network.link, "cut", True))
    cut.start()
    begun = time.monotonic()
    came = b.get(KEYS)
    assert network.link.cut
    assert len(came) < len(KEYS)
    assert network.num_carried - before > 100, "it was in the middle"
    assert time.monotonic() - begun < TIMEOUT_S + STAT_S + MARGIN_S

    # It is left alone: what is asked for meanwhile waits for nothing.
    b.until(lambda: b.state() != "ok")
    begun = time.monotonic()
    assert len(b.get(KEYS)) <= len(came)
    assert time.monotonic() - begun < 1.0

    network.link.cut, network.link.rate = False, 0.0
    b.patiently(KEYS, LONGEST_PAUSE_S)
    assert b.state() == "ok"
    b.store(chunk_keys(3, 1))
    a.patiently(chunk_keys(3, 1), LONGEST_PAUSE_S)


def test_a_link_that_breaks_and_heals_again_and_again(network: Network, pair: Pair) -> None:
    a, b = pair
    a.store(KEYS)
    network.link.rate, network.link.loss = 8e6, 0.01
    stop = threading.Event()

    def flap() -> None:
        while not stop.wait(0.3):
            network.link.cut = not network.link.cut

    flapping = threading.Thread(target=flap)
    flapping.start()
    end = time.monotonic() + 6
    num_loads = 0
    while time.monotonic() < end:
        b.cold()
        b.get(KEYS)
        num_loads += 1
    stop.set()
    flapping.join()
    network.link.cut = False
    assert num_loads > 1
    b.patiently(KEYS, LONGEST_PAUSE_S)


def test_a_peer_that_stops_in_the_middle(network: Network, pair: Pair) -> None:
    a, b = pair
    took = cut_short(network, pair, signal.SIGSTOP)
    assert took < TIMEOUT_S + STAT_S + MARGIN_S
    a.process.send_signal(signal.SIGCONT)
    network.link.rate = 0.0
    b.cold()
    b.patiently(KEYS, LONGEST_PAUSE_S)


def test_a_peer_that_is_killed_in_the_middle() -> None:
    with two_nodes() as (network, pair):
        assert cut_short(network, pair, signal.SIGKILL) < MARGIN_S


def cut_short(network: Network, pair: Pair, number: int) -> float:
    """Signal the peer in the middle of a load; how long that took. What did not come is stored."""
    a, b = pair
    a.store(KEYS)
    network.link.rate = 2e6
    threading.Timer(0.4, a.process.send_signal, (number,)).start()
    begun = time.monotonic()
    came = b.get(KEYS)
    took = time.monotonic() - begun
    assert len(came) < len(KEYS)
    b.store(KEYS)
    assert b.get(KEYS) == [0] * len(KEYS)
    return took
