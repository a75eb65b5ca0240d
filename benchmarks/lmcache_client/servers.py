"""OpenAI servers of vLLM, each with another cache behind it, and LMCache's daemon."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import CHUNK_TOKENS

from kvstrata.testing import serving
from kvstrata.testing.ports import HOST, free_port
from kvstrata.testing.serving import ANSWER_S, MODEL, Program

MAX_MODEL_TOKENS = 4096


class Server(serving.Server):
    """vLLM's OpenAI server with some cache behind it.

    Args:
        model: folder of the model.
        connector: its ``kv_transfer_config``.
        environment: on top of an engine's.
        num_blocks: of its own KV cache.
        log: for everything that it prints.
    """

    def __init__(
        self,
        model: Path,
        connector: Mapping[str, Any],
        environment: Mapping[str, str],
        num_blocks: int,
        log: Path,
    ) -> None:
        options = {
            "max-model-len": MAX_MODEL_TOKENS,
            "block-size": CHUNK_TOKENS,
            "num-gpu-blocks-override": num_blocks,
            "kv-transfer-config": json.dumps(connector),
        }
        super().__init__(model, log, environment, options)

    def _call(self, path: str, content: Mapping[str, Any] | None = None) -> str:
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            body: bytes = answer.read()
            return body.decode()

    def answer(self, text: str, max_tokens: int) -> str:
        """Answer one message of a user, greedily."""
        content = {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        reply = json.loads(self._call("/v1/chat/completions", content))
        found: str = reply["choices"][0]["message"]["content"]
        return found

    def hits(self) -> tuple[int, int]:
        """Tokens found so far: in vLLM's own prefix cache, and behind it."""
        found = {"vllm:prefix_cache_hits_total": 0, "vllm:external_prefix_cache_hits_total": 0}
        for line in self._call("/metrics").splitlines():
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
        "-m",
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
    return Program(command, http_port, log, environment, "/healthcheck")
