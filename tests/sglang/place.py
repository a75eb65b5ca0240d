"""Where SGLangs and one node meet, in a folder of their own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.engine.checked_node import CODE
from tests.engine.service import Serviced
from tests.sglang.children import HICACHE, Server

PATIENCE_S = 60.0

CONNECTOR: Mapping[str, object] = {
    "backend_name": "kvstrata",
    "module_path": "kvstrata.connectors.sglang",
    "class_name": "KVStrataStorage",
    "interface_v1": 1,
    "hicache_storage_pass_prefix_keys": True,
}
"""SGLang's extra configuration for KVStrata, without KVStrata's own options."""


class Place(Serviced):
    """SGLangs and their node, which looks at its own laws; leaving it ends them all.

    Args:
        model: folder of the model.
        settings: KVStrata's options, dotted.
    """

    def __init__(self, model: Path, settings: Mapping[str, Any] | None = None) -> None:
        defaults = {"host.capacity": "256MiB", "planner": "off"}
        self._servers: list[Server] = []
        super().__init__(model, {**defaults, **(settings or {})}, CODE)

    def storage(self, settings: Mapping[str, Any] | None = None) -> dict[str, object]:
        """SGLang's options for one with KVStrata behind its cache."""
        extra = {**CONNECTOR, **self._settings, **(settings or {})}
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
        fresh: bool = False,
    ) -> Server:
        """Begin to start an SGLang with KVStrata.

        Args:
            options: of SGLang, on top of `storage`.
            environment: on top of what every one has.
            model: another one.
            settings: KVStrata's, on top of those of this place.
            fresh: as of `Server`.
        """
        log = self.folder / f"sglang-{len(self._servers)}-{os.urandom(2).hex()}.log"
        server = Server(
            model or self._model,
            log,
            {**self.storage(settings), **(options or {})},
            {**self.environment, **(environment or {})},
            fresh,
        )
        self._servers.append(server)
        return server

    def end(self) -> None:
        """End every process here and wait for that; the folder stays."""
        for server in self._servers:
            server.kill()
        self._servers.clear()
        super().end()

    def check(self) -> None:
        """After every scenario: nothing is held any more, and no bug was hit."""

        def quiet() -> bool:
            held = self.node.status()["leases"]
            return not any(held[name] for name in ("count", "reservations", "bytes"))

        eventually(quiet, "all leases and reservations returned")
        counters = self.node.status()["counters"]
        assert not {name for name in counters if name.startswith("bugs_")}


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as it holds; fail when it does not for this long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
