"""Peers over NIXL on a bad network, as `test_peer_network` over TCP: UCX's TCP, real processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from tests.support import networks
from tests.support.networks import Network
from tests.support.services import KEYS, MARGIN_S, NBYTES, Pair, cut_short, two_nodes

from kvstrata.tiers.one_peer import LONGEST_PAUSE_S
from kvstrata.tiers.peer import STAT_S, TIMEOUT_S
from kvstrata.transfer.peers import NIXL

pytest.importorskip("nixl_cu12", reason="NIXL is not installed: scripts/install-dev.sh")
WHY_NOT = networks.missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def standing() -> Iterator[tuple[Network, Pair]]:
    with two_nodes(NIXL) as both:
        yield both


def test_a_slow_link_a_partition_and_its_end(standing: tuple[Network, Pair]) -> None:
    network, (a, b) = standing
    a.store(KEYS)
    network.link.delay_s, network.link.loss = 0.02, 0.01
    before = network.num_carried
    b.patiently(KEYS, LONGEST_PAUSE_S)
    assert network.num_carried - before > len(KEYS) * NBYTES // networks.MTU
    assert a.counted('peer_sent_bytes_total{by="nixl"}') >= len(KEYS) * NBYTES
    assert a.counted('peer_sent_bytes_total{by="tcp"}') == 0

    network.link.delay_s, network.link.loss = 0.0, 0.0
    took = cut_short(network, (a, b), lambda: setattr(network.link, "cut", True))
    assert took < TIMEOUT_S + STAT_S + MARGIN_S

    network.link.cut, network.link.rate = False, 0.0
    b.cold()
    b.patiently(KEYS, LONGEST_PAUSE_S)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_peer_that_ends_in_the_middle(
    standing: tuple[Network, Pair], number: signal.Signals
) -> None:
    """Stopped, gone on again, and killed at last."""
    network, (a, b) = standing
    network.link = networks.Link()
    b.cold()
    b.heard(LONGEST_PAUSE_S)
    took = cut_short(network, (a, b), lambda: a.process.send_signal(number))
    assert took < TIMEOUT_S + STAT_S + MARGIN_S
    if number == signal.SIGSTOP:
        a.process.send_signal(signal.SIGCONT)
        network.link.rate = 0.0
        assert b.get(KEYS) == [0] * len(KEYS), "no late byte spoils what was stored since"
        b.cold()
        b.patiently(KEYS, LONGEST_PAUSE_S)
