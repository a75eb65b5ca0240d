"""What the stories of the demo have in common: documents, engines that are warmed up, a voice."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.demo_results import Asked
from kvstrata.testing.others import OtherWork

if TYPE_CHECKING:
    from kvstrata.testing.engine import Answer, Engine
    from kvstrata.wire.client import NodeClient

#: a prompt is computed in steps of so many tokens; documents are a whole number of them, so that
#: cold and warm split the work alike and rounding gives no reason for another token
STEP_TOKENS = 1024
CHUNK_TOKENS = 128
DOCUMENT_STEPS = (2, 3, 4, 5, 6, 7)
ANSWER_TOKENS = 16
QUESTION = "\n\nQuestion: What is the text above about, in one sentence?\n\nAnswer: The text"


class Story:
    """Documents that engines are asked about, told line by line on stderr while it happens.

    Args:
        out: an existing folder; what is stored lies in it meanwhile.
        steps: length of each document, in steps.
    """

    def __init__(self, out: Path, steps: Sequence[int]) -> None:
        self._out = out
        self._steps = steps
        self._began = time.monotonic()
        self._prompts: list[list[int]] = []
        self.asked: list[Asked] = []
        self.machine: dict[str, Any] = {}
        self.others = OtherWork()

    def _read_documents(self, model: Path) -> Any:
        from transformers import AutoTokenizer

        from kvstrata.testing.models import documents

        tokenizer = AutoTokenizer.from_pretrained(model)
        question = tokenizer.encode(QUESTION)
        longest = documents(len(self._steps), max(self._steps) * STEP_TOKENS, tokenizer)
        for number, (steps, text) in enumerate(zip(self._steps, longest, strict=True), 1):
            prompt = [*text[: steps * STEP_TOKENS], *question]
            self._prompts.append(prompt)
            self.asked.append(Asked(number, len(prompt)))
        self._warm_up = [*documents(1, STEP_TOKENS, tokenizer, seed=1)[0], *question]
        return tokenizer

    def _started(self, engine: Engine, client: NodeClient) -> None:
        from kvstrata.testing.workplace import wait_ready

        about = engine.wait()
        self.machine = {"cores": os.cpu_count(), **about}
        self._say(
            f"vLLM {about['vllm']} is up with {about['threads']} threads (pid {engine.pid}), "
            f"KVStrata's node with {client.hello.capacity_bytes >> 20} MiB (pid {client.hello.pid})"
        )
        wait_ready(client)
        # The first steps of a process are slow, whatever they compute.
        engine.ask(self._warm_up)
        engine.ask(self._warm_up)

    def ask_once(self, way: str, engine: Engine, asked: Asked, prompt: Sequence[int]) -> Answer:
        """Ask, and keep what is to be told of the answer."""
        answer = engine.ask(prompt, ANSWER_TOKENS)
        asked.first_ms.setdefault(way, []).append(round(answer.first_s * 1e3, 1))
        asked.tokens.setdefault(way, []).append(answer.tokens)
        return answer

    def _say(self, text: str) -> None:
        typer.echo(f"[{time.monotonic() - self._began:5.0f} s] {text}", err=True)
