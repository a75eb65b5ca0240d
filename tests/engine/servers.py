"""vLLM's OpenAI server beside a node of its own, each a process that can be killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstrata.errors import NodeUnavailable
from kvstrata.testing.engine import engine_environment, last_words
from kvstrata.testing.workplace import Workplace
from kvstrata.wire.client import NodeClient

HOST = "127.0.0.1"
MODEL = "tiny"
PATIENCE_S = 300.0
BLOCKS = 256


def free_port() -> int:
    with socket.create_server((HOST, 0)) as reserved:
        port: int = reserved.getsockname()[1]
        return port


class Program:
    """A program that answers HTTP; one that ends can be started again on its port.

    Args:
        command: its arguments, behind Python's own.
        port: where it listens.
        log: for everything that it prints.
        environment: its whole environment.
    """

    def __init__(
        self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]
    ) -> None:
        self._command = [sys.executable, *command]
        self._log = log
        self._environment = dict(environment)
        self.url = f"http://{HOST}:{port}"
        self.start()

    def start(self) -> None:
        """Begin to start it."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return once it answers."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                pass
            assert self._process.poll() is None, last_words(self._log)
            assert time.monotonic() < deadline, f"it does not answer: {last_words(self._log)}"
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill it, and the processes that it has started. Repeatable."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ask(
        self, prompt: Sequence[int], max_tokens: int, timeout_s: float = 120.0, **more: Any
    ) -> dict[str, Any]:
        """The whole answer to a prompt, greedy.

        Raises:
            urllib.error.HTTPError: its status says why not.
        """
        body = {
            "model": MODEL,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **more,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def tokens(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> list[int]:
        """The tokens of an answer."""
        found: list[int] = self.ask(prompt, max_tokens, **more)["choices"][0]["token_ids"]
        return found


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
        port = free_port()
        command = [
            "-m", "vllm.entrypoints.openai.api_server",
            f"--model={model}", f"--served-model-name={MODEL}",
            f"--host={HOST}", f"--port={port}",
            "--dtype=bfloat16", "--max-model-len=8192", "--enforce-eager",
            f"--num-gpu-blocks-override={BLOCKS}",
            f"--kv-transfer-config={json.dumps(self.connector)}",
            "--uvicorn-log-level=warning",
        ]  # fmt: skip
        environment = engine_environment(
            {
                **self.environment,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "VLLM_CPU_OMP_THREADS_BIND": str(core),
                "VLLM_SERVER_DEV_MODE": "1",  # it can be made to forget its prefixes
            }
        )
        self.server = Program(command, port, self.folder / "server.log", environment)
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
        deadline = time.monotonic() + 30.0
        while True:
            request = urllib.request.Request(f"{self.server.url}/reset_prefix_cache", b"")
            with urllib.request.urlopen(request, timeout=30) as response:
                if json.load(response)["success"]:
                    break
            assert time.monotonic() < deadline, "blocks are still held"
            time.sleep(0.05)
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
