"""Programs that answer HTTP as OpenAI's server does: vLLM's, and what stands before it.

Each is a process that can be killed and started again on its port.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kvstrata.errors import UsageError
from kvstrata.testing.engine import ENGINE_OPTIONS, engine_environment, last_words
from kvstrata.testing.ports import HOST, free_port

MODEL = "model"
"""What each server calls the model that it serves."""
START_S = 600.0
ANSWER_S = 600.0
FORGET_S = 30.0


class Streamed(NamedTuple):
    """An answer: when it was asked for, and when each token came, in seconds."""

    begun: float
    times: list[float]
    tokens: list[int]

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.begun

    @property
    def gaps(self) -> list[float]:
        """Between a token and the next."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def stream(url: str, model: str, prompt: Sequence[int], max_tokens: int) -> Streamed:
    """Have a prompt answered, token by token, greedily.

    Args:
        url: of the server, without ``/v1``.
        model: as the server calls it.
        prompt: token ids.
        max_tokens: of the answer, which has so many.
    Raises:
        UsageError: the answer broke off.
        urllib.error.HTTPError: there is none; its status says why.
    """
    body = {**_greedy(model, prompt, max_tokens), "stream": True}
    begun, times, tokens = time.perf_counter(), list[float](), list[int]()
    with urllib.request.urlopen(_request(url, body), timeout=ANSWER_S) as response:
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise UsageError(f"an answer broke off: {event['error']}")
            new = [token for choice in event["choices"] for token in choice["token_ids"]]
            times += [time.perf_counter()] * len(new)
            tokens += new
    if len(tokens) != max_tokens:
        raise UsageError(f"{len(tokens)} tokens instead of {max_tokens}")
    return Streamed(begun, times, tokens)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Processes that this thread starts meanwhile have one core of this machine, and no other.

    vLLM's own `VLLM_CPU_OMP_THREADS_BIND` binds nothing where an engine has one rank.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Program:
    """A program that answers HTTP; starts at once.

    Args:
        command: its arguments, behind Python's own.
        port: where it listens.
        log: for everything that it prints.
        environment: its whole environment.
        health: a path that it answers once it is ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        environment: Mapping[str, str],
        health: str = "/health",
    ) -> None:
        self._command = [sys.executable, *command]
        self._log = log
        self._environment = dict(environment)
        self._health = health
        self.url = f"http://{HOST}:{port}"
        self.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

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
        """Return once it answers.

        Raises:
            UsageError: it does not; with the last lines that it printed.
        """
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(self.url + self._health, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise UsageError(f"it did not start: {self.last_words()}")
            time.sleep(0.1)

    def last_words(self) -> str:
        """The last lines that it printed, each on a line of its own."""
        return last_words(self._log)

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
        body = {**_greedy(MODEL, prompt, max_tokens), **more}
        with urllib.request.urlopen(_request(self.url, body), timeout=timeout_s) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def tokens(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> list[int]:
        """The tokens of an answer."""
        found: list[int] = self.ask(prompt, max_tokens, **more)["choices"][0]["token_ids"]
        return found

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Streamed:
        """The same, token by token; see `stream`."""
        return stream(self.url, MODEL, prompt, max_tokens)


class Server(Program):
    """vLLM's OpenAI server, which can be made to forget its prefixes.

    Args:
        model: folder of the model.
        log: for everything that it prints.
        environment: on top of this process's and of an engine's.
        options: of the server, on top of `ENGINE_OPTIONS`, in its own spelling without dashes.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        environment: Mapping[str, str],
        options: Mapping[str, object],
    ) -> None:
        port = free_port()
        command = [
            # The `vllm` command needs metadata of a package by that name, which the CPU's has not.
            "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager",
            f"--model={model}", f"--served-model-name={MODEL}", f"--host={HOST}", f"--port={port}",
            f"--dtype={ENGINE_OPTIONS['dtype']}",
            f"--max-model-len={ENGINE_OPTIONS['max_model_len']}",
            *[f"--{name}={value}" for name, value in options.items()],
            "--uvicorn-log-level=warning",
        ]  # fmt: skip
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1", **environment}
        super().__init__(command, port, log, engine_environment(more))

    def version(self) -> str:
        """Of vLLM."""
        with urllib.request.urlopen(f"{self.url}/version", timeout=ANSWER_S) as response:
            return str(json.load(response)["version"])

    def reset_prefix_cache(self) -> None:
        """Make vLLM forget its own prefixes; what is behind it stays.

        Raises:
            UsageError: its blocks are still held after half a minute.
        """
        deadline = time.monotonic() + FORGET_S
        while True:
            request = urllib.request.Request(f"{self.url}/reset_prefix_cache", b"")
            with urllib.request.urlopen(request, timeout=FORGET_S) as response:
                if json.load(response)["success"]:
                    return
            if time.monotonic() > deadline:
                raise UsageError("vLLM's prefix cache cannot be reset: blocks are still held")
            time.sleep(0.05)


def _greedy(model: str, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def _request(url: str, body: Mapping[str, Any]) -> urllib.request.Request:
    return urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
