"""Nodes of one deployment that answer each other over real sockets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.attached import Attached, secret_in

from kvstrata.config import load_config
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.transfer.tcp import Address


class Member(Attached):
    """A node of a deployment, in this process, and a client of it."""

    def __init__(self, folder: Path, peers: Sequence[Address] = (), **options: Any) -> None:
        overrides: dict[str, Any] = {
            "host.capacity": "1MiB",
            "host.verify_every": 0,
            "leases.per_client": "80%",
            "secret_file": str(secret_in(folder)),
            "network.listen": "127.0.0.1:0",
            "peer.lookup_timeout": "2s",
            **({"peer.nodes": ", ".join(map(str, peers))} if peers else {}),
            **options,
        }
        if not peers and "peer.named" not in options:
            del overrides["peer.lookup_timeout"]
        self.closed = False
        self.inprocess = InProcessNode(load_config(environ={}, overrides=overrides))
        super().__init__(self.inprocess.connect())

    @property
    def address(self) -> Address:
        assert self.inprocess.peers is not None
        return self.inprocess.peers.address

    def ready(self) -> Member:
        """Once it has heard of a peer."""
        self.heard()
        return self

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.inprocess.check_integrity()
            self.client.close()
            self.inprocess.close()
