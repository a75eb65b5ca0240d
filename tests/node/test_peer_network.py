"""Peers on a bad network: real nodes in namespaces, a link that delays, loses, limits and breaks.

Whatever the network does, a load brings the right bytes or a miss, within its deadlines, and a peer
that can be reached again is used again.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from tests.support import networks
from tests.support.networks import Link, Network
from tests.support.nodes import chunk_keys
from tests.support.services import KEYS, MARGIN_S, NBYTES, Pair, cut_short, two_nodes

from kvstrata.tiers.one_peer import LONGEST_PAUSE_S
from kvstrata.tiers.peer import STAT_S, TIMEOUT_S

WHY_NOT = networks.missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


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
    took = cut_short(network, pair, lambda: setattr(network.link, "cut", True))
    assert took < TIMEOUT_S + STAT_S + MARGIN_S

    # It is left alone: what is asked for meanwhile waits for nothing.
    b.until(lambda: b.state() != "ok")
    b.cold()
    begun = time.monotonic()
    assert b.get(KEYS) == []
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
    took = cut_short(network, pair, partial(a.process.send_signal, signal.SIGSTOP))
    assert took < TIMEOUT_S + STAT_S + MARGIN_S
    a.process.send_signal(signal.SIGCONT)
    network.link.rate = 0.0
    b.cold()
    b.patiently(KEYS, LONGEST_PAUSE_S)


def test_a_peer_that_is_killed_in_the_middle() -> None:
    with two_nodes() as (network, pair):
        took = cut_short(network, pair, pair[0].process.kill)
        assert took < MARGIN_S
