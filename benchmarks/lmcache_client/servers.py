"""OpenAI servers of vLLM, each with another cache behind it, and LMCache's daemon."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import CHUNK_TOKENS, Wrong

from kvstrata.testing.engine import ENGINE_OPTIONS, engine_environment

HOST = "127.0.0.1"
START_S = 600.0
END_S = 30.0
LAST_LINES = 40
MAX_MODEL_TOKENS = 4096


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        port: int = bound.getsockname()[1]
        return port


class Program:
    """A process that answers HTTP; starts at once. Close it.

    Args:
        command: a module of Python and its arguments.
        log: file for what it prints.
        health: a path that it answers once it is ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        port: int,
        health: str,
    ) -> None:
        self.url = f"http://{HOST}:{port}"
        self._health = health
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
            )

    def wait(self) -> None:
        """Return when it answers.

        Raises:
            Wrong: it did not start; with the last lines that it printed.
        """
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                self.call(self._health)
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                lines = self._log.read_text(errors="replace").splitlines()[-LAST_LINES:]
                raise Wrong("\n".join([f"{self._log.stem} did not start:", *lines]))
            time.sleep(0.1)

    def call(self, path: str, content: Mapping[str, Any] | None = None) -> str:
        """GET, or POST where there is content; the body of the answer."""
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            body: bytes = answer.read()
            return body.decode()

    def close(self) -> None:
        """End it and wait for that. Repeatable."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Server(Program):
    """vLLM's OpenAI server.

    Args:
        name: for its log.
        model: folder of the model.
        connector: its ``kv_transfer_config``.
        num_blocks: of its own KV cache.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        connector: Mapping[str, Any],
        environment: Mapping[str, str],
        num_blocks: int,
        log: Path,
    ) -> None:
        port = free_port()
        self.name = name
        self._model = str(model)
        command = [
            # The `vllm` command needs metadata of a package by that name, which the CPU's has not.
            "vllm.entrypoints.openai.api_server",
            f"--model={model}",
            f"--host={HOST}",
            f"--port={port}",
            f"--dtype={ENGINE_OPTIONS['dtype']}",
            f"--max-model-len={MAX_MODEL_TOKENS}",
            "--enforce-eager",
            f"--block-size={CHUNK_TOKENS}",
            f"--num-gpu-blocks-override={num_blocks}",
            f"--kv-transfer-config={json.dumps(connector)}",
            "--uvicorn-log-level=warning",
        ]
        # The development mode has the call that makes vLLM forget its own prefixes.
        more = {"VLLM_SERVER_DEV_MODE": "1", **environment}
        super().__init__(command, engine_environment(more), log, port, "/health")

    def reset_prefix_cache(self) -> None:
        """Make vLLM forget its own prefixes; what is behind it stays."""
        deadline = time.monotonic() + 10.0
        while not json.loads(self.call("/reset_prefix_cache", {}))["success"]:
            if time.monotonic() > deadline:
                raise Wrong(f"{self.name}: vLLM's prefix cache cannot be reset")
            time.sleep(0.01)

    def answer(self, text: str, max_tokens: int) -> str:
        """Answer one message of a user, greedily."""
        content = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        reply = json.loads(self.call("/v1/chat/completions", content))
        found: str = reply["choices"][0]["message"]["content"]
        return found

    def hits(self) -> tuple[int, int]:
        """Tokens found so far: in vLLM's own prefix cache, and behind it."""
        found = {"vllm:prefix_cache_hits_total": 0, "vllm:external_prefix_cache_hits_total": 0}
        for line in self.call("/metrics").splitlines():
            name = line.partition("{")[0]
            if name in found:
                found[name] += int(float(line.split()[-1]))
        own, behind = found.values()
        return own, behind


def native(module: str, gib: int) -> dict[str, Any]:
    """vLLM's own offloading to host memory, with this module's copies."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CPUMemorySpec",
            "spec_module_path": module,
            "cpu_bytes_to_use": gib << 30,
        },
    }


def lmcache(port: int) -> dict[str, Any]:
    """LMCache's connector to its daemon."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.host": f"tcp://{HOST}",
            "lmcache.mp.port": port,
        },
    }


def daemon(environment: Mapping[str, str], port: int, gib: int, log: Path) -> Program:
    """LMCache's daemon, over shared memory, its fastest way here."""
    http_port = free_port()
    command = [
        "lmcache.cli.main",
        "server",
        f"--host={HOST}",
        f"--port={port}",
        f"--http-port={http_port}",
        f"--chunk-size={CHUNK_TOKENS}",
        "--eviction-policy=LRU",
        "--supported-transfer-mode=auto",
        "--disable-observability",
        f"--l1-size-gb={gib}",
        f"--l1-init-size-gb={gib}",
        f"--shm-name=kvstrata_peer_{port}",
    ]
    return Program(command, environment, log, http_port, "/healthcheck")
