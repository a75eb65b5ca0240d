"""vLLM's OpenAI server beside a node of its own, each a process that can be killed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvstrata.errors import NodeUnavailable
from kvstrata.testing.serving import HOST, MODEL, Program, Server, free_port
from kvstrata.testing.workplace import Workplace
from kvstrata.wire.client import NodeClient

__all__ = ["HOST", "MODEL", "Program", "Site", "free_port"]

BLOCKS = 256


class Site(Workplace):
    """One side: a node as a service, and an engine that answers HTTP.

    Args:
        model: folder of the model.
        settings: KVStrata's options.
        core: that the engine computes on.
    """

    def __init__(self, model: Path, settings: Mapping[str, Any], core: int) -> None:
        common = {"host.capacity": "256MiB", "planner": "off", "deadlines.request": "10s"}
        super().__init__(model, {**common, **settings}, service=True)
        self.server = Server(
            model,
            self.folder / "server.log",
            {**self.environment, "VLLM_CPU_OMP_THREADS_BIND": str(core)},
            {
                "num-gpu-blocks-override": BLOCKS,
                "kv-transfer-config": json.dumps(self.connector),
            },
        )
        self._known: NodeClient | None = None

    def end(self) -> None:
        self.server.kill()
        super().end()

    @property
    def node(self) -> NodeClient:
        """The test's own client of the node."""
        if self._known is None or not self._known.alive:
            self._known = self.client()
        return self._known

    def kill_node(self) -> None:
        """As a crash ends it."""
        assert self._service is not None
        self._service.kill()
        self._service.wait()
        self._known = None

    def start_node(self) -> None:
        """Another one in its place."""
        self._serve()

    def records(self) -> list[dict[str, Any]]:
        """Of the requests that ended lately."""
        try:
            found: list[dict[str, Any]] = self.node.status()["requests"]
        except NodeUnavailable:
            return []
        return found

    def forget(self) -> None:
        """Have nothing of any prompt, neither the engine nor its node."""
        self.server.reset_prefix_cache()
        self.node.clear()

    def check(self) -> None:
        """Nothing is held any more, and no bug was hit."""
        deadline = time.monotonic() + 60.0
        while True:
            state = self.node.status()
            held = state["leases"]
            if not any(held[name] for name in ("count", "reservations", "bytes")):
                break
            assert time.monotonic() < deadline, f"still held: {held}"
            time.sleep(0.05)
        assert not {name for name in state["counters"] if name.startswith("bugs_")}
