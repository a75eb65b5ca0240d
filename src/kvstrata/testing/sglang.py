"""A real SGLang that answers HTTP, in a process of its own, with KVStrata behind its cache.

On a machine without a GPU SGLang's packages lack compiled parts: what stands in for them has to be
on ``PYTHONPATH``, see ``docs/sglang.md``.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstrata.errors import UsageError
from kvstrata.testing.engine import Answer, engine_environment
from kvstrata.testing.ports import HOST, free_port
from kvstrata.testing.serving import ANSWER_S, FORGET_S, Program

CONNECTOR: Mapping[str, object] = {
    "backend_name": "kvstrata",
    "module_path": "kvstrata.connectors.sglang",
    "class_name": "KVStrataStorage",
    "interface_v1": 1,
    "hicache_storage_pass_prefix_keys": True,
}
"""SGLang's extra configuration for KVStrata, without KVStrata's own options."""

HICACHE: Mapping[str, object] = {
    "enable-hierarchical-cache": True,
    "hicache-ratio": 2.0,
    "hicache-mem-layout": "page_first_direct",
    "hicache-io-backend": "direct",
    "hicache-host-memory-mode": "buffer_only",
    "hicache-write-policy": "write_through",
    "hicache-storage-prefetch-policy": "wait_complete",
}
"""Its options for storage behind its cache."""

CPU_OPTIONS: Mapping[str, object] = {
    "device": "cpu",
    # The only one that needs no compiled kernels.
    "attention-backend": "torch_native",
    "disable-cuda-graph": True,
}
CPU_ENVIRONMENT: Mapping[str, str] = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A few small functions would be compiled for longer than they ever run.
    "TORCH_COMPILE_DISABLE": "1",
    # To be up is to answer, not to have answered a prompt.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
}


def storage(settings: Mapping[str, Any]) -> dict[str, object]:
    """SGLang's options for one with KVStrata behind its cache.

    Args:
        settings: KVStrata's options, dotted.
    """
    extra = {**CONNECTOR, "kvstrata": dict(settings)}
    return {
        **HICACHE,
        "hicache-storage-backend": "dynamic",
        "hicache-storage-backend-extra-config": json.dumps(extra),
    }


def spelled(options: Mapping[str, object]) -> list[str]:
    """Options as arguments of a command line: True for a flag, None to leave one out."""
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not None
    ]


class SGLang(Program):
    """Starts at once, as ``python -m sglang.launch_server``.

    Args:
        model: folder of the model.
        log: for everything that it prints.
        environment: on top of this process's.
        options: of SGLang, in its own spelling without dashes.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        environment: Mapping[str, str],
        options: Mapping[str, object],
    ) -> None:
        port = free_port()
        own = {"model-path": str(model), "host": HOST, "port": port, "enable-cache-report": True,
               "skip-server-warmup": True}  # fmt: skip
        command = ["-m", "sglang.launch_server", *spelled({**own, **options})]
        super().__init__(command, port, log, {**engine_environment(environment)})

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """Answer a prompt, greedily, and say when the first token came.

        Raises:
            UsageError: the answer broke off.
            urllib.error.HTTPError: there is none; its status says why.
        """
        greedy = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": greedy, "stream": True}
        begun, first_s, last = time.perf_counter(), 0.0, dict[str, Any]()
        with self._post("/generate", body, ANSWER_S) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                first_s = first_s or time.perf_counter() - begun
                last = json.loads(line[6:])
        tokens = list(last.get("output_ids", ()))
        if len(tokens) != max_tokens:
            raise UsageError(f"an answer broke off: {last}")
        return Answer(first_s, tokens, last["meta_info"]["cached_tokens"])

    def forget(self) -> None:
        """Make it forget its own levels of cache; what is behind them stays.

        Raises:
            UsageError: it was still busy half a minute later.
        """
        deadline = time.monotonic() + FORGET_S
        while True:
            try:
                self._post("/flush_cache", {}, FORGET_S).close()
                return
            except urllib.error.HTTPError as error:
                if time.monotonic() > deadline:
                    raise UsageError("SGLang's cache cannot be flushed: it is busy") from error
            time.sleep(0.05)

    def _post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=timeout_s)
