"""A real vLLM in a process of its own, asked over a pipe.

What the demo and the benchmarks are made of: an `Engine` answers prompts one batch at a time and
says when the first token came.

``python -m kvstrata.testing.engine FD`` is the child's side of the pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

from kvstrata.errors import UsageError

CONNECTOR = {
    "kv_connector": "KVStrataConnector",
    "kv_connector_module_path": "kvstrata.connectors.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
"""vLLM's ``kv_transfer_config`` for KVStrata, without KVStrata's own options."""

ENGINE_OPTIONS: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 8192,
    "disable_log_stats": True,
}
ENGINE_ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # One process computes and answers, so that what is timed holds no hop between processes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
PATIENCE_S = 900.0
NODE_END_S = 30.0


@dataclass(frozen=True)
class Answer:
    """What one prompt got.

    Args:
        first_s: seconds from handing in its batch to its first token.
        tokens: the new tokens.
        cached_tokens: prompt tokens that were not computed, wherever they came from.
    """

    first_s: float
    tokens: list[int]
    cached_tokens: int


class Process(Protocol):
    """What an engine needs of its child: a `subprocess.Popen`, or what is used like one."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """How it ended, by a signal if negative; None before anyone waited for it."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Its `returncode`, once it has ended; `subprocess.TimeoutExpired` if that takes longer."""
        ...

    def kill(self) -> None:
        """Send it SIGKILL."""
        ...


class Engine:
    """A vLLM in a child process; starts at once, `wait` returns when it can answer.

    It dies with its creator: the child ends when the pipe does.

    Args:
        model: folder of the model.
        log: file for everything the child prints.
        environment: the child's, on top of this process's and of `ENGINE_ENVIRONMENT`.
        options: vLLM's ``LLM`` arguments, on top of `ENGINE_OPTIONS`.
    """

    #: the child's side of the pipe, run as a module
    program: ClassVar[str] = __name__

    def __init__(
        self, model: Path, log: Path, environment: Mapping[str, str], options: Mapping[str, Any]
    ) -> None:
        self._log = log
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = self._start(theirs, environment)
        self._socket = ours
        self._pipe: IO[str] = ours.makefile("rw")
        self._say({"model": str(model), **ENGINE_OPTIONS, **options})
        self._about: dict[str, Any] | None = None

    def _start(self, theirs: socket.socket, environment: Mapping[str, str]) -> Process:
        """Begin the child at the other end of this socket."""
        with self._log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", self.program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env=engine_environment(environment),
            )

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def wait(self) -> dict[str, Any]:
        """Return once it can answer: versions, threads, and blocks of its KV cache.

        Raises:
            UsageError: it did not start; with the last lines that it printed.
        """
        if self._about is None:
            self._about = self._hear(PATIENCE_S)
        return self._about

    def ask(
        self,
        prompt: Sequence[int],
        max_tokens: int = 1,
        transfer: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Answer one prompt, greedily; ``transfer`` are its ``kv_transfer_params``."""
        return self.ask_all([prompt], max_tokens, transfer=transfer)[1][0]

    def ask_all(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 1,
        in_turn: bool = False,
        transfer: Mapping[str, Any] | None = None,
    ) -> tuple[float, list[Answer]]:
        """Answer several prompts.

        Args:
            in_turn: the next one is handed in when the one before is answered; all at once if not.
            transfer: the ``kv_transfer_params`` of each of them.
        Returns:
            Seconds from handing in the first to the end of the last answer, and the answers.
        """
        reply = self._call(
            verb="ask",
            prompts=[list(prompt) for prompt in prompts],
            max_tokens=max_tokens,
            in_turn=in_turn,
            transfer=transfer,
        )
        return reply["seconds"], [Answer(**answer) for answer in reply["answers"]]

    def likely(
        self, prompt: Sequence[int], transfer: Mapping[str, Any] | None = None
    ) -> list[float]:
        """Log-probability of each token of the vocabulary to follow a prompt.

        Needs the option ``max_logprobs`` of -1.
        """
        reply = self._call(verb="likely", prompt=list(prompt), transfer=transfer)
        found: list[float] = reply["logprobs"]
        return found

    def reset_prefix_cache(self) -> None:
        """Make vLLM forget its own prefixes; what KVStrata holds stays."""
        self._call(verb="reset")

    def detach(self) -> None:
        """Take the connector out of the engine, which then runs as it would without one.

        For comparisons inside one process, where two processes would differ by chance.
        """
        self._call(verb="detach")

    def attach(self) -> None:
        """Undo `detach`."""
        self._call(verb="attach")

    def close(self) -> None:
        """End the process and wait for that. Repeatable."""
        with contextlib.suppress(OSError, ValueError):
            self._pipe.close()
        self._socket.close()
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, **request: Any) -> dict[str, Any]:
        self.wait()
        self._say(request)
        return self._hear(PATIENCE_S)

    def _say(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a dead child is reported where its answer is missed
            self._pipe.write(json.dumps(message) + "\n")
            self._pipe.flush()

    def _hear(self, timeout_s: float) -> dict[str, Any]:
        self._socket.settimeout(timeout_s)
        try:
            line = self._pipe.readline()
        except OSError as error:
            raise UsageError(f"the engine does not answer ({error}); see {self._log}") from error
        if not line:
            self.close()
            status = self._process.returncode or 0
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            raise UsageError(f"the engine ended {how}: {last_words(self._log)}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UsageError(f"the engine refused: {reply['error']}")
        return reply


def compute_cores() -> str:
    """The cores that every engine here is bound to: the first two this process may use.

    With a connector vLLM leaves one core more unused, and engines with different numbers of
    threads cannot be compared, so all are bound alike.
    """
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))


def engine_environment(more: Mapping[str, str]) -> dict[str, str]:
    """A child's environment: this process's without KVStrata's options, which would be everybody's,
    with what every engine gets, and ``more``."""
    kept = {"KVSTRATA_MODEL_CACHE"}
    own = {k: v for k, v in os.environ.items() if not k.startswith("KVSTRATA_") or k in kept}
    cores = {"VLLM_CPU_OMP_THREADS_BIND": compute_cores()}
    path = {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    return {**own, **ENGINE_ENVIRONMENT, **cores, **path, **more}


def last_words(log: Path, count: int = 12) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        return "\n".join(["", *lines[-count:]]) if lines else "it printed nothing"
    return "it printed nothing"


class _Child:
    """The child's side: an ``LLM`` in this process, and what can be asked of it."""

    def __init__(self, options: dict[str, Any]) -> None:
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(**options)
        self._engine = self._llm.llm_engine
        self._number = 0
        self._removed: tuple[Any, Any] | None = None

    def about(self) -> dict[str, Any]:
        import torch

        cache = self._engine.vllm_config.cache_config
        kept = self._engine.engine_core.engine_core.scheduler.kv_cache_config
        return {
            "vllm": self._vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "num_blocks": cache.num_gpu_blocks,
            "block_tokens": cache.block_size,
            "num_groups": len(kept.kv_cache_groups),
        }

    def ask(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        in_turn: bool,
        transfer: dict[str, Any] | None,
    ) -> dict[str, Any]:
        params = self._vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        if transfer is not None:
            params.extra_args = {"kv_transfer_params": transfer}
        batches = [[prompt] for prompt in prompts] if in_turn else [prompts]
        answers: list[dict[str, Any]] = []
        began = time.perf_counter()
        for batch in batches:
            answers += self._batch(batch, params)
            ended = time.perf_counter()
            # A serving engine takes this step by itself, after the answer: hand in late stores.
            self._engine.step()
        return {"seconds": ended - began, "answers": answers}

    def likely(self, prompt: list[int], transfer: dict[str, Any] | None) -> dict[str, Any]:
        params = self._vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
        if transfer is not None:
            params.extra_args = {"kv_transfer_params": transfer}
        self._number += 1
        name = str(self._number)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        found: list[float] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    (each,) = output.outputs[0].logprobs
                    found = [each[token].logprob for token in sorted(each)]
        self._engine.step()
        return {"logprobs": found}

    def _batch(self, prompts: list[list[int]], params: Any) -> list[dict[str, Any]]:
        began = time.perf_counter()
        numbers: dict[str, int] = {}
        for i, prompt in enumerate(prompts):
            self._number += 1
            numbers[str(self._number)] = i
            self._engine.add_request(
                str(self._number), {"prompt_token_ids": prompt}, params.clone()
            )
        answers: list[dict[str, Any]] = [{} for _ in prompts]
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                answer = answers[numbers[output.request_id]]
                if output.outputs[0].token_ids:
                    answer.setdefault("first_s", time.perf_counter() - began)
                if output.finished:
                    answer["tokens"] = list(output.outputs[0].token_ids)
                    answer["cached_tokens"] = output.num_cached_tokens
        return answers

    def reset(self) -> dict[str, Any]:
        deadline = time.monotonic() + 10.0
        # It answers False while blocks wait to be freed, which takes a step.
        while not self._llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                return {"error": "vLLM's prefix cache cannot be reset"}
            self._engine.step()
        return {}

    def detach(self) -> dict[str, Any]:
        from vllm.distributed.kv_transfer import kv_transfer_state

        scheduler = self._engine.engine_core.engine_core.scheduler
        if self._removed is None:
            self._removed = scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT
            scheduler.connector = kv_transfer_state._KV_CONNECTOR_AGENT = None
        return {}

    def attach(self) -> dict[str, Any]:
        from vllm.distributed.kv_transfer import kv_transfer_state

        scheduler = self._engine.engine_core.engine_core.scheduler
        if self._removed is not None:
            scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = self._removed
            self._removed = None
        return {}


def serve_pipe(fd: int, start: Callable[[dict[str, Any]], Any], verbs: Sequence[str]) -> None:
    """The child's life: start with the first line's options, then answer a verb a line.

    Args:
        start: what has a method for each verb, and ``about``, the first answer.
    """
    with socket.socket(fileno=fd) as connected, connected.makefile("rw") as pipe:

        def say(message: Mapping[str, Any]) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        child = start(json.loads(pipe.readline()))
        say(child.about())
        for line in pipe:
            request = json.loads(line)
            verb = request.pop("verb")
            assert verb in verbs
            say(getattr(child, verb)(**request))


if __name__ == "__main__":
    serve_pipe(int(sys.argv[1]), _Child, ("ask", "likely", "reset", "detach", "attach"))
