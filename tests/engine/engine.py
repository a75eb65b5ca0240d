"""A real vLLM that tests drive step by step, and plain vLLM's answers to compare with.

bfloat16 rounds differently when a batch is cut differently. So a cold answer is compared with plain
vLLM's cold one, and a warm answer with what plain vLLM answers upon a hit in its own prefix cache:
both then compute the same tail, and every token must be the same.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tests.engine import serve_child
from tests.engine.children import Child, surroundings

from kvstrata.testing import engine as base

CHUNK = 128
NEW_TOKENS = 32
BLOCKS = 256
"""Of vLLM's cache: two documents of the longest kind side by side. Faulting in 1 GiB takes long."""

Prompt = list[int]


class Answer(NamedTuple):
    """What one prompt got: the new tokens, and how many of the prompt's were not computed."""

    tokens: list[int]
    cached: int


def request(prompt: Sequence[int], max_tokens: int = NEW_TOKENS, **more: Any) -> dict[str, Any]:
    """One request as `Engine.ask` takes it.

    Args:
        more: ``salt``, ``lora``, ``embeds``, ``regex`` of the answer, ``images`` (seeds of them),
            ``transfer`` (its ``kv_transfer_params``), ``logprobs`` (of so many tokens each).
    """
    return {"prompt": list(prompt), "max_tokens": max_tokens, **more}


def whole_chunks(num_tokens: int) -> int:
    """Tokens of the whole chunks of a prompt."""
    return num_tokens // CHUNK * CHUNK


class Engine(base.Engine):
    """vLLM in a child process that runs `tests/engine/serve_child.py`.

    Args:
        fresh: a process of its own from its first line on; see `tests.support.forked`.
        new_tokens: how many to answer with where a request does not say.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        environment: Mapping[str, str],
        options: Mapping[str, Any],
        fresh: bool = False,
        new_tokens: int = NEW_TOKENS,
    ) -> None:
        self._fresh = fresh
        self._new_tokens = new_tokens
        super().__init__(model, log, environment, {"num_gpu_blocks_override": BLOCKS, **options})

    def _start(self, theirs: socket.socket, environment: Mapping[str, str]) -> base.Process:
        more = surroundings(environment)
        return Child(serve_child.serve, (theirs,), self._log, more, self._fresh)

    @property
    def log(self) -> str:
        """Everything the child printed so far."""
        return self._log.read_text(errors="replace")

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """What the child's method of this name returns."""
        return self._call(verb=verb, **arguments)

    def answers(
        self, requests: Sequence[Mapping[str, Any] | Prompt], in_turn: bool = True
    ) -> list[Answer]:
        """Answer requests, each alone in its batch, or all at once."""
        asked = [
            request(item, self._new_tokens) if isinstance(item, list) else dict(item)
            for item in requests
        ]
        reply = self.call("ask", requests=asked, in_turn=in_turn)
        return [Answer(answer["tokens"], answer["cached"]) for answer in reply["answers"]]

    def answer(self, prompt: Sequence[int], max_tokens: int | None = None, **more: Any) -> Answer:
        """Answer one request."""
        return self.answers([request(prompt, max_tokens or self._new_tokens, **more)])[0]

    def forget(self, connector: bool = False) -> int:
        """Make vLLM forget its own prefixes; how often it refused, blocks not being free yet."""
        refused: int = self.call("reset", connector=connector)["refused"]
        return refused

    def free_blocks(self) -> tuple[int, int]:
        """Free blocks, and all blocks."""
        reply = self.call("blocks")
        return reply["free"], reply["all"]

    def keys(self, tokens: Sequence[int], salt: str = "") -> list[bytes]:
        """Chunk keys as the connector in this engine makes them."""
        return [bytes.fromhex(key) for key in
                self.call("keys", tokens=list(tokens), salt=salt)["keys"]]  # fmt: skip

    def kv(self, tokens: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Bytes of the full blocks that vLLM holds of these tokens: (layers, blocks, page)."""
        path = self._log.with_suffix(".kv")
        about = self.call("kv", tokens=list(tokens), path=str(path))
        data = np.frombuffer(path.read_bytes(), np.uint8)
        path.unlink()
        return data.reshape(about["layers"], about["blocks"], -1)
