"""Ports for servers that are started on loopback and have to be told theirs beforehand."""

from __future__ import annotations

import random
import socket
from pathlib import Path

HOST = "127.0.0.1"
SECOND = 10000
"""How far above a server's port its second one is, where it has one, as in a Redis Cluster."""
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
WIDTH = 10000


def free_port() -> int:
    """A port that nobody listens on, nor on its second one.

    It is below those that the system gives to whoever only connects, so none of them takes it
    before the server does.
    """
    first_given = int(RANGE.read_text().split()[0])
    below = max(first_given - SECOND, 1024 + WIDTH)
    draw = random.SystemRandom()  # not what a test has seeded, as another process has
    while True:
        port = draw.randrange(below - WIDTH, below)
        try:
            for one in (port, port + SECOND):
                socket.create_server((HOST, one)).close()
        except OSError:
            continue
        return port


def free_ports(count: int) -> list[int]:
    """As many, each another."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)
