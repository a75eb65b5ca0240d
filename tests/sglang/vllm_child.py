"""A vLLM beside SGLang, in a process of vLLM's own environment.

``python -m tests.sglang.vllm_child FD`` is the child's side of the pipe.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.sglang.children import NEW_TOKENS, Answer

from kvstrata.testing import engine as base

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.prefix).with_name(".venv") / "bin" / "python"
"""Of the environment with vLLM, which ``make test-vllm`` makes beside SGLang's."""


class VLLM(base.Engine):
    """vLLM; begins to start at once.

    Args:
        model: folder of the model.
        log: for everything that it prints.
        settings: KVStrata's options, dotted.
    """

    program = "tests.sglang.vllm_child"

    def __init__(self, model: Path, log: Path, settings: Mapping[str, Any]) -> None:
        connector = {**base.CONNECTOR, "kv_connector_extra_config": dict(settings)}
        options = {
            "max_model_len": 4096,
            "num_gpu_blocks_override": 64,
            "kv_transfer_config": connector,
        }
        super().__init__(model, log, {}, options)

    def answers(
        self, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS, salt: str = ""
    ) -> list[Answer]:
        """The greedy answers to prompts, one after the other; vLLM has forgotten all before."""
        asked = [list(prompt) for prompt in prompts]
        reply = self._call(verb="ask", prompts=asked, new_tokens=new_tokens, salt=salt)
        return [
            Answer(one["tokens"], one["logprobs"], one["cached"], one["cached"])
            for one in reply["answers"]
        ]

    @property
    def log(self) -> str:
        """Everything that it has printed."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """Kill it, and wait for that. Repeatable."""
        self._process.kill()
        super().close()

    def _start(self, theirs: socket.socket, environment: Mapping[str, str]) -> base.Process:
        # SGLang's environment is none of vLLM's, and two threads of it would wait for one another.
        own = {
            name: value
            for name, value in base.engine_environment(environment).items()
            if not name.startswith(("SGLANG_", "VIRTUAL_ENV"))
        }
        own |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        with self._log.open("ab") as output:
            return subprocess.Popen(
                [str(PYTHON), "-m", self.program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                pass_fds=[theirs.fileno()], env=own,
            )  # fmt: skip


class _Child:
    """The child's side: an ``LLM`` in this process."""

    def __init__(self, options: dict[str, Any]) -> None:
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(**options)
        self._engine = self._llm.llm_engine

    def about(self) -> dict[str, Any]:
        return {"vllm": self._vllm.__version__}

    def ask(self, prompts: list[list[int]], new_tokens: int, salt: str) -> dict[str, Any]:
        params = self._vllm.SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0
        )
        answers = []
        for prompt in prompts:
            while not self._llm.reset_prefix_cache():
                self._engine.step()
            asked = {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
            (output,) = self._llm.generate(asked, params, use_tqdm=False)
            self._engine.step()  # a serving engine takes it by itself: hand in late stores
            (made,) = output.outputs
            answers.append({
                "tokens": list(made.token_ids),
                "logprobs": [
                    one[token].logprob
                    for token, one in zip(made.token_ids, made.logprobs, strict=True)
                ],
                "cached": output.num_cached_tokens,
            })  # fmt: skip
        return {"answers": answers}


if __name__ == "__main__":
    base.serve_pipe(int(sys.argv[1]), _Child, ("ask",))
