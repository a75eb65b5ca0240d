"""The node, for as long as there is one: several threads use it, and none waits for it to come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvstrata.config import Config
from kvstrata.connectors.link import Link
from kvstrata.wire.client import NodeClient


class Attachment:
    """One client that several threads use at once; a dead one goes when the last has left it.

    Args:
        config: says which node.
        who: for the log.
        left: called with a client that has died; its leases died with it.
    """

    def __init__(self, config: Config, who: str, left: Callable[[NodeClient], None]) -> None:
        self._link = Link(config, who)
        self._left = left
        self._client: NodeClient | None = None
        self._users = 0
        self._closed = False
        self._lock = threading.Lock()
        self._link.start()

    def wait(self, timeout_s: float) -> None:
        """Wait until the first attempt to attach has ended, well or not."""
        self._link.wait(timeout_s)

    @contextmanager
    def client(self) -> Iterator[NodeClient | None]:
        """The node's client; None while there is no node. Its memory stays mapped meanwhile."""
        client = self._enter()
        try:
            yield client
        finally:
            if client is not None:
                with self._lock:
                    self._users -= 1
                if self._closed:
                    self._let_go()

    def close(self) -> None:
        """Let go of the node. Repeatable; who still uses it ends what it does, and the last of
        them hangs up."""
        self._link.close()
        with self._lock:
            self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            client = self._client if not self._users else None
            if client is not None:
                self._client = None
        if client is not None:
            client.close()

    def _enter(self) -> NodeClient | None:
        with self._lock:
            if self._closed:
                return None
            client, gone = self._client, None
            if client is not None and not client.alive:
                if self._users:
                    return None
                client, gone = None, client
            if client is None:
                client = self._link.take()
                if client is None:
                    self._link.start()
            self._client = client
            if client is not None:
                self._users += 1
        if gone is not None:
            self._left(gone)
            gone.close()
        return client
