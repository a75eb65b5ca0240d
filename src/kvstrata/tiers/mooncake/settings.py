"""How a node takes part in a Mooncake Store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

_MASTER = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")

EXPECTED = 'a host and a port, such as "10.0.0.1:50051"'


class Master(NamedTuple):
    """Where the master listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_master(value: Any) -> Master:
    """The master's address.

    Raises:
        ValueError: it is none.
    """
    found = _MASTER.fullmatch(value) if isinstance(value, str) else None
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise ValueError(f"{value!r} is not an address")
    return Master(found[1], int(found[2]))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the library's client is opened with.

    Args:
        master: where objects are asked for.
        metadata: where clients find each other; ``P2PHANDSHAKE``: by asking one another.
        protocol: ``tcp`` or ``rdma``.
        device: of ``rdma``; empty: the library picks.
        segment_bytes: of this machine's memory for the store; 0: none.
        buffer_bytes: of registered memory beside the pool, for what lies elsewhere.
        replicas: copies of each object, on as many machines.
        soft_pin: whether objects stay longer than those of others that are not pinned.
    """

    master: Master
    metadata: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    device: str = ""
    segment_bytes: int = 0
    buffer_bytes: int = 64 << 20
    replicas: int = 1
    soft_pin: bool = False
