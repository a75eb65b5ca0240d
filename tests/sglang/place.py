"""Where SGLangs and one node meet, in a folder of their own."""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engine.checked_node import CODE
from tests.engine.service import Serviced
from tests.sglang.children import ADMIN_KEY, HICACHE, PAGE, Server

from kvstrata.testing.sglang import CONNECTOR
from kvstrata.testing.workplace import wait_stored
from kvstrata.wire.client import NodeClient

PATIENCE_S = 60.0

ADMIN: Mapping[str, object] = {"admin-api-key": ADMIN_KEY}
"""Of an SGLang whose storage is exchanged while it runs."""


class Place(Serviced):
    """SGLangs and their node, which looks at its own laws; leaving it ends them all.

    Args:
        model: folder of the model.
        settings: KVStrata's options, dotted.
        on_demand: leave it to the first SGLang to start the node, which then is one as released.
    """

    def __init__(
        self, model: Path, settings: Mapping[str, Any] | None = None, on_demand: bool = False
    ) -> None:
        # Patient, since the machine may be busy; how long is waited at most is for other tests.
        defaults = {"host.capacity": "256MiB", "planner": "off", "deadlines.request": "5s"}
        self._servers: list[Server] = []
        super().__init__(model, {**defaults, **(settings or {})}, False if on_demand else CODE)

    @property
    def servers(self) -> list[Server]:
        """Those that were started here, in turn."""
        return list(self._servers)

    def storage(self, settings: Mapping[str, Any] | None = None) -> dict[str, object]:
        """SGLang's options for one with KVStrata behind its cache."""
        # Without it SGLang asks for nothing that is shorter than 256 tokens.
        own = {**self._settings, **(settings or {})}
        extra = {**CONNECTOR, "prefetch_threshold": PAGE, "kvstrata": own}
        return {
            **HICACHE,
            "hicache-host-memory-mode": "buffer_only",
            "hicache-storage-backend": "dynamic",
            "hicache-storage-backend-extra-config": json.dumps(extra),
        }

    def server(
        self,
        options: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        model: Path | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Server:
        """Begin to start an SGLang with KVStrata.

        Args:
            options: of SGLang, on top of `storage`.
            environment: on top of what every one has.
            model: another one.
            settings: KVStrata's, on top of those of this place.
        """
        log = self.folder / f"sglang-{len(self._servers)}-{os.urandom(2).hex()}.log"
        server = Server(
            model or self._model,
            log,
            {**self.storage(settings), **(options or {})},
            {**self.environment, **(environment or {})},
        )
        self._servers.append(server)
        return server

    def await_hits(self, server: Server) -> None:
        """Until its ranks use the node; that there is another one they notice when they ask."""

        def hits() -> bool:
            server.flush()
            return server.ask([7] * (PAGE + 1), 1).loaded == PAGE

        eventually(hits, "a hit")

    def detach(self, server: Server) -> None:
        """Let SGLang's operator take the storage away, as soon as it is idle; see `ADMIN`."""

        def gone() -> bool:
            with contextlib.suppress(urllib.error.HTTPError):
                server.post("/hicache/storage-backend", {}, "DELETE")
                return True
            return False

        eventually(gone, "SGLang lets go of its storage")

    def attach(self, server: Server, settings: Mapping[str, Any] | None = None) -> None:
        """Let SGLang's operator give it one with KVStrata; ``settings`` as of `storage`."""
        storage = self.storage(settings)
        asked = {
            name.replace("-", "_"): storage[name.removesuffix("-json")]
            for name in (
                "hicache-storage-backend",
                "hicache-storage-backend-extra-config-json",
                "hicache-storage-prefetch-policy",
            )
        }
        server.post("/hicache/storage-backend", asked, "PUT")

    def end(self) -> None:
        """End every process here and wait for that; the folder stays."""
        for server in self._servers:
            server.kill()
        self._servers.clear()
        super().end()

    def check(self) -> None:
        """After every scenario: nothing is held any more, and no bug was hit."""

        held: dict[str, Any] = {}

        def quiet() -> bool:
            held.update(self.node.status()["leases"])
            return not any(held[name] for name in ("count", "reservations", "bytes"))

        try:
            eventually(quiet, "all leases and reservations returned")
        except AssertionError:
            raise AssertionError(f"still held: {held}") from None
        counters = self.node.status()["counters"]
        assert not {name for name in counters if name.startswith("bugs_")}


def disk(folder: Path) -> dict[str, str]:
    """Options of a disk tier. It has no codec, for a read is over sooner than a compiler, and which
    disk `exact` takes for a slow one depends on how busy it is."""
    return {"disk.path": str(folder), "disk.capacity": "1GiB", "disk.codec": "raw"}


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as it holds; fail when it does not for this long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def pages(num_tokens: int) -> int:
    """Tokens of the whole pages before the last of so many, which is always computed."""
    return max(0, num_tokens - 1) // PAGE * PAGE


@contextmanager
def await_stored(node: NodeClient, num_tokens: int) -> Iterator[None]:
    """Leave the block when it has stored so many tokens' pages, and a node has them everywhere."""
    before = node.status()["counters"].get("stored_objects_total", 0)
    yield
    wait_stored(node, before + num_tokens // PAGE)


def loaded_from(node: NodeClient) -> Counter[str]:
    """Tokens that a node's prefetches have loaded so far, by the tier where they were."""
    loaded: Counter[str] = Counter()
    for record in node.status()["requests"]:
        loaded.update(record["tier_tokens"])
    return loaded
