"""A real SGLang that answers HTTP, in processes of its own that can be killed.

It starts as ``python -m sglang.launch_server`` does, forked off a process that has imported SGLang:
three seconds instead of fifteen. Its scheduler and its detokenizer are forked then too.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.forked import Forked, fork_server

from kvstrata.errors import UsageError
from kvstrata.testing.engine import Process, last_words
from kvstrata.testing.ports import HOST, free_port
from kvstrata.testing.sglang import spelled

SHIMS = Path(__file__).parent / "shims"
START_S = 240.0
START_TRIES = 3
ANSWER_S = 120.0
NEW_TOKENS = 8
PAGE = 128

ENVIRONMENT: Mapping[str, str] = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Two that share busy cores spend their time waiting for one another.
    "OMP_NUM_THREADS": "1",
    # A few small functions would be compiled for longer than they ever run.
    "TORCH_COMPILE_DISABLE": "1",
    # To be up is to answer, not to have answered a prompt.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
}
"""Of every SGLang here."""

OPTIONS: Mapping[str, object] = {
    "device": "cpu",
    # The only one that needs no compiled kernels.
    "attention-backend": "torch_native",
    "disable-cuda-graph": True,
    "skip-server-warmup": True,
    # Its scheduler looks for work without a pause otherwise: a core less for who has some.
    "sleep-on-idle": True,
    "enable-cache-report": True,
    "page-size": PAGE,
    "context-length": 4096,
    "max-total-tokens": 8192,
    "max-running-requests": 16,
    "mem-fraction-static": 0.3,
    "random-seed": 0,
}
"""Of every SGLang here, as `Server` takes them."""

HICACHE: Mapping[str, object] = {
    "enable-hierarchical-cache": True,
    "hicache-ratio": 2.0,
    "hicache-io-backend": "direct",
    "hicache-mem-layout": "page_first_direct",
    "hicache-storage-prefetch-policy": "wait_complete",
    "hicache-write-policy": "write_through",
}
"""Of one with storage behind its cache."""

ADMIN_KEY = "for-tests"
"""SGLang lets its storage be exchanged only where it has one."""
AUTHORIZED: dict[str, str] = {"Authorization": f"Bearer {ADMIN_KEY}"}
READY = "The server is fired up and ready to roll!"


class Answer(NamedTuple):
    """What one prompt got.

    Args:
        tokens: the new tokens.
        logprobs: their log-probabilities.
        cached: tokens of the prompt that were not computed, wherever they came from.
        loaded: those of them that came from the storage behind SGLang's cache.
    """

    tokens: list[int]
    logprobs: list[float]
    cached: int
    loaded: int

    def like(self, other: Answer) -> bool:
        """Whether both say the same, however they came about.

        Where a CPU has AMX, SGLang alone rounds otherwise when less is computed at once, or when
        its KV lies elsewhere: up to 0.0009 were seen.
        """
        most = 0.005 if "amx_tile" in Path("/proc/cpuinfo").read_text() else 0.0
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return self.tokens == other.tokens and all(abs(a - b) <= most for a, b in pairs)


class Server:
    """An SGLang that answers HTTP; begins to start at once.

    Args:
        model: folder of the model.
        log: for everything that its processes print.
        options: on top of `OPTIONS`, in its own spelling without dashes; True for a flag, None to
            leave one of those out.
        environment: on top of this process's and of `ENVIRONMENT`.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        options: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        self._log_file = log
        self._begins_at = log.stat().st_size if log.exists() else 0
        self._ready_at: int | None = None
        own = {"model-path": str(model), "host": HOST, "port": port}
        arguments = spelled({**own, **OPTIONS, **(options or {})})
        self._arguments, self._around = arguments, surroundings(environment)
        self._process = self._begin()

    def _begin(self) -> Process:
        server = fork_server("tests.sglang.preload", surroundings)
        return Forked(launch, (self._arguments,), self._log_file, self._around, server)

    @property
    def pid(self) -> int:
        """Of the process that answers HTTP."""
        return self._process.pid

    @property
    def log(self) -> str:
        """Everything that it has printed."""
        return self._said_since(self._begins_at)

    @property
    def said(self) -> str:
        """Everything that it has printed since it was up, where a traceback is one too many.

        Before, SGLang may try a request to itself before it listens.
        """
        self.wait()
        assert self._ready_at is not None
        return self._said_since(self._ready_at)

    def ended(self) -> bool:
        """Whether it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0)
            return True
        return False

    def wait(self) -> None:
        """Return once it answers.

        Raises:
            UsageError: it does not; with the last lines that it printed.
        """
        if self._ready_at is not None:
            return
        deadline, tries = time.monotonic() + START_S, START_TRIES
        while READY not in self.log or not self._healthy():
            if self.ended() or time.monotonic() > deadline:
                self.kill()
                tries -= 1
                if not tries or time.monotonic() > deadline:
                    raise UsageError(f"SGLang did not start: {last_words(self._log_file, 40)}")
                # It gives itself ten seconds to answer; a busy machine may need more.
                self._begins_at = self._log_file.stat().st_size
                self._process = self._begin()
            time.sleep(0.05)
        self._ready_at = self._log_file.stat().st_size

    def ask(self, prompt: Sequence[int], new_tokens: int = NEW_TOKENS, **more: Any) -> Answer:
        """The greedy answer to a prompt; ``more`` is of the request, ``extra_key`` for instance.

        Raises:
            urllib.error.HTTPError: there is none; its status says why.
        """
        return self.ask_all([prompt], new_tokens, **more)[0]

    def ask_all(
        self, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS, **more: Any
    ) -> list[Answer]:
        """The answers to several prompts that are handed in at once."""
        greedy = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        request = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": greedy,
            "return_logprob": True,
            **more,
        }
        return [_answer(told) for told in json.loads(self.post("/generate", request))]

    def flush(self) -> None:
        """Make it forget its own levels of cache; what is behind them stays.

        Raises:
            UsageError: it was still busy half a minute later.
        """
        deadline = time.monotonic() + 30.0
        while True:
            with contextlib.suppress(urllib.error.HTTPError):
                self.post("/flush_cache", {})
                return
            if time.monotonic() > deadline:
                raise UsageError("SGLang's cache cannot be flushed: it is busy")
            time.sleep(0.05)

    def post(self, path: str, request: Mapping[str, Any], method: str = "POST") -> str:
        """What it answers to a request in JSON."""
        self.wait()
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json", **AUTHORIZED}
        asked = urllib.request.Request(self.url + path, body, headers, method=method)
        with urllib.request.urlopen(asked, timeout=ANSWER_S) as response:
            return str(response.read(), "utf-8")

    def get(self, path: str) -> str:
        """What it answers to a request for a page."""
        self.wait()
        asked = urllib.request.Request(self.url + path, headers=AUTHORIZED)
        with urllib.request.urlopen(asked, timeout=ANSWER_S) as response:
            return str(response.read(), "utf-8")

    def stop(self) -> None:
        """End it as its operator does, and wait for that; what does not end is killed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30.0)
        self.kill()

    def kill(self) -> None:
        """Kill all its processes, and wait for that. Repeatable."""
        # It leads a group of its own, which its children may outlive it in.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    close = kill

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def _said_since(self, offset: int) -> str:
        if not self._log_file.exists():
            return ""
        with self._log_file.open("rb") as log:
            log.seek(offset)
            return log.read().decode(errors="replace")


def surroundings(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """A child's environment: this process's without KVStrata's options, and the stand-ins."""
    kept = {"KVSTRATA_MODEL_CACHE"}
    own = {k: v for k, v in os.environ.items() if not k.startswith("KVSTRATA_") or k in kept}
    path = [str(SHIMS), *(part for part in sys.path if part and part != str(SHIMS))]
    return {**own, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path), **(more or {})}


def launch(arguments: list[str]) -> None:
    """The child's side: SGLang's own program, whose processes are forked off it."""
    os.setsid()
    multiprocessing.set_start_method = functools.partial(_fork, multiprocessing.set_start_method)
    sys.argv = ["sglang.launch_server", *arguments]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def _fork(set_start_method: Any, method: str, force: bool = False) -> None:
    """In place of ``set_start_method``, which SGLang asks for processes that import all anew."""
    set_start_method("fork", force=True)


def _answer(told: Mapping[str, Any]) -> Answer:
    meta = told["meta_info"]
    return Answer(
        list(told["output_ids"]),
        [probability for probability, *_ in meta["output_token_logprobs"]],
        meta["cached_tokens"],
        (meta.get("cached_tokens_details") or {}).get("storage", 0),
    )
