"""vLLM's OpenAI server beside a node of its own, each a process that can be killed."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.engine.checked_node import CODE
from tests.engine.children import ONE_THREAD
from tests.engine.service import Serviced

from kvstrata.errors import NodeUnavailable
from kvstrata.testing.ports import HOST, free_port
from kvstrata.testing.serving import MODEL, Program, Server

__all__ = ["HOST", "Program", "Site", "events", "free_port"]

BLOCKS = 256
ANSWER_S = 120.0


def events(
    program: Program, prompt: Sequence[int], max_tokens: int, **more: Any
) -> tuple[list[dict[str, Any]], bool]:
    """The events of an answer that comes piece by piece; whether it came to its end.

    Raises:
        urllib.error.HTTPError: its status says why not.
    """
    body = {
        "model": MODEL, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "stream": True,
        "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{program.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        lines = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    done = lines[-1:] == [b"[DONE]"]
    return [json.loads(line) for line in lines[: len(lines) - done]], done


class Site(Serviced):
    """One side: a node as a service, and an engine that answers HTTP.

    The engine computes in float32, so that a batch that is cut otherwise rounds no token away.

    Args:
        model: folder of the model.
        settings: KVStrata's options.
        options: of the server, beside those of every one.
    """

    def __init__(
        self,
        model: Path,
        settings: Mapping[str, Any],
        options: Mapping[str, object] | None = None,
    ) -> None:
        common = {"host.capacity": "256MiB", "deadlines.request": "10s"}
        common |= {"planner": "off", "inside": "off"}
        super().__init__(model, {**common, **settings}, CODE)
        self.server = Server(
            model,
            self.folder / "server.log",
            {**self.environment, **ONE_THREAD},
            {
                "dtype": "float32",
                "num-gpu-blocks-override": BLOCKS,
                "kv-transfer-config": json.dumps(self.connector),
                **(options or {}),
            },
        )

    def end(self) -> None:
        self.server.kill()
        super().end()

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
