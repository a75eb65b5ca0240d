"""Clients that are killed: what they held is freed within a second of their death, not before."""

from __future__ import annotations

import os
import time

import pytest
from tests.node.conftest import Start
from tests.support.nodes import NAMESPACE, ORDER, RAW, chunk_keys, payload, template

from kvstrata.config import Config
from kvstrata.objects import HEADER_BYTES
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect

IDLE = "pass"
# The copy runs until the very end, into slots whose commit never comes.
COPYING = """
slots = [client.pool.view(o + HEADER_BYTES, RAW) for o in offsets_of(client.reserved.offsets)]
say("copying")
while True:
    for slot in slots:
        slot[:] = bytes([time.time_ns() & 255]) * RAW
"""
# The grandchild keeps the socket, so that the node never sees it closed.
WITH_GRANDCHILD = """
if os.fork() == 0:
    say("grandchild", os.getpid())
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


def holdings(client: NodeClient) -> tuple[int, int]:
    leases = client.status()["leases"]
    return leases["count"], leases["reservations"]


@pytest.mark.parametrize("then", [IDLE, COPYING, WITH_GRANDCHILD])
def test_killed(config: Config, start: Start, then: str) -> None:
    watcher = connect(config)
    process = start("client = hold()\nsay('holding')\n" + then + "\nsys.stdin.read()\n")
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    grandchild = 0
    if then is not IDLE:
        words = process.stdout.readline().split()
        grandchild = int(words[1]) if words[0] == "grandchild" else 0
    try:
        for _ in range(20):
            assert holdings(watcher) == (1, 1), "freed while its client lived"
        process.kill()
        killed = time.monotonic()
        while holdings(watcher) != (0, 0):
            assert time.monotonic() - killed < 1.0
        if grandchild:
            os.kill(grandchild, 0)  # it still has the socket
        keys = chunk_keys(4, process.pid)
        matched = watcher.match(keys, [0], [ORDER], [RAW]).wait(5)
        assert len(matched.tiers) == 4, "what was committed stays"
        for key, offset in zip(keys, offsets_of(matched.offsets), strict=True):
            assert bytes(watcher.pool.view(offset + HEADER_BYTES, RAW)) == payload(key)
        abandoned = chunk_keys(2, -process.pid)
        assert watcher.lookup(abandoned, [0]) == b"\xff\xff"
        reserved = watcher.reserve(NAMESPACE, abandoned, 0, 0, template()).wait(5)
        assert min(offsets_of(reserved.offsets)) >= 0, "its keys can be written again"
    finally:
        if grandchild:
            os.kill(grandchild, 9)
        watcher.close()


def test_a_socket_closed_without_a_word(config: Config, start: Start) -> None:
    watcher = connect(config)
    process = start(
        """
        client = hold()
        client._connection.lose("the cable was cut")
        say("closed")
        sys.stdin.readline()
        """
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "closed\n"
    for _ in range(50):
        assert holdings(watcher) == (1, 1)
    process.stdin.close()
    process.wait(10)
    ended = time.monotonic()
    while holdings(watcher) != (0, 0):
        assert time.monotonic() - ended < 1.0
    watcher.close()


def test_bye(config: Config, start: Start) -> None:
    watcher = connect(config)
    process = start("client = hold()\nclient.close()\nsay('bye')\nsys.stdin.readline()\n")
    assert process.stdout is not None
    assert process.stdout.readline() == "bye\n"
    said = time.monotonic()
    while holdings(watcher) != (0, 0):
        assert time.monotonic() - said < 1.0
    assert process.poll() is None
    watcher.close()


def test_the_node_killed(config: Config) -> None:
    client = connect(config)
    pid = client.hello.pid
    call = client.match(chunk_keys(2), [0], [ORDER], [RAW])
    call.wait(5)
    view = client.pool.view(0, 4096)
    os.kill(pid, 9)
    started = time.monotonic()
    with pytest.raises(Exception, match=r"gone|hung up"):  # noqa: PT012
        while time.monotonic() - started < 10:
            client.match(chunk_keys(2), [0], [ORDER], [RAW]).wait(5)
    assert not client.alive
    view[:] = bytes(4096)  # the memory outlives the node while somebody maps it
    client.close()
    again = connect(config)
    assert again.hello.pid != pid
    assert again.hello.node != client.hello.node
    assert again.hello.secret == client.hello.secret
    again.close()
