"""An upgrade of machines with real engines: the engine first, or the node first.

Beside a node of another release an engine computes, and joins once there is one of its own. The
last release runs as it was released, engine and node.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.engine.children import surroundings
from tests.engine.engine import Engine, Prompt, request, whole_chunks
from tests.engine.place import Place, eventually
from tests.engine.plain import Plain, Texts
from tests.engine.shared import Engines
from tests.support.releases import end_node, serve_released, unpack

from kvstrata.testing.engine import CONNECTOR, Process

pytestmark = pytest.mark.engine

OPTIONS: dict[str, Any] = {"dtype": "float32"}
CHILD = """
import socket, sys
from tests.engine.serve_child import serve
serve(socket.socket(fileno=int(sys.argv[1])))
"""


class ReleasedEngine(Engine):
    """vLLM with the connector of the last release."""

    def __init__(self, released: Path, model: Path, log: Path, settings: Mapping[str, Any]) -> None:
        self._released = released
        connector = {**CONNECTOR, "kv_connector_extra_config": dict(settings)}
        super().__init__(model, log, {}, {**OPTIONS, "kv_transfer_config": connector})

    def _start(self, theirs: Any, environment: Mapping[str, str]) -> Process:
        path = surroundings()["PYTHONPATH"]
        with self._log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", CHILD, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env=surroundings({**environment, "PYTHONPATH": f"{self._released}:{path}"}),
            )


class Asked(NamedTuple):
    """An engine, and what it is asked."""

    engine: Engine
    prompts: list[Prompt]
    plain: Plain

    def cached(self) -> list[int]:
        """Tokens of each prompt that its node had; every answer is the one of plain vLLM."""
        self.engine.forget()
        answers = self.engine.answers([request(prompt) for prompt in self.prompts])
        assert [answer.tokens for answer in answers] == self.plain.cold(self.prompts)
        return [answer.cached for answer in answers]

    def joins(self) -> None:
        """It finds a node of its own release by itself, stores there, and hits."""
        whole = [whole_chunks(len(prompt)) for prompt in self.prompts]
        eventually(lambda: self.cached() == whole, "it has joined")


def test_the_engine_first_or_the_node_first(
    engines: Engines, tiny_llama: Path, texts: Texts, tmp_path: Path
) -> None:
    released, prompts = unpack(tmp_path / "released"), texts.of(300, 700, 1500)
    plain = engines.plain(tiny_llama, **OPTIONS)
    with ExitStack() as ends:
        # Of this release already: the engine on one machine, the node on the other.
        one, other = (ends.enter_context(Place(tiny_llama)) for _ in range(2))
        common = {
            "secret_file": str(tmp_path / "secret"),
            "host.capacity": "64MiB",
            "disk.capacity": "1GiB",
            "disk.codec": "raw",
        }
        known = []
        for place in (one, other):
            mine = {"node": f"unix:{place.folder}/node.sock", "disk.path": f"{place.folder}/disk"}
            known.append({**common, **mine})
            for name, value in known[-1].items():
                place.set(name, value)
        old = ReleasedEngine(released, tiny_llama, other.folder / "old.log", known[1])
        ends.callback(old.close)
        new = one.engine(**OPTIONS)
        serve_released(released, known[0])
        other.start_node()
        upgraded, behind = Asked(new, prompts, plain), Asked(old, prompts, plain)
        for asked, words in ((upgraded, "speaks protocol 1"), (behind, "speaks protocol 2")):
            for _ in range(2):
                assert asked.cached() == [0] * len(prompts)
            assert words in asked.engine.log

        end_node(one.folder / "node.sock", signal.SIGKILL)
        one.start_node()
        other.kill_node()
        serve_released(released, known[1])
        upgraded.joins()
        behind.joins()

        # Each node goes on with the other one's disk: an upgrade, and the way back.
        one.stop_node()
        end_node(other.folder / "node.sock", signal.SIGTERM)
        one.set("disk.path", known[1]["disk.path"])
        one.start_node()
        serve_released(released, {**known[1], "disk.path": known[0]["disk.path"]})
        eventually(lambda: one.node.status()["tiers"][0]["state"] == "ok", "it knows the disk")
        upgraded.joins()
        assert one.count('hit_chunks_total{tier="disk"}') > 0, "what the last release left hits"
        behind.joins()
        one.check()
        end_node(other.folder / "node.sock", signal.SIGTERM)
