"""What the stories of the demo have in common: documents, a voice, and a look at the clock."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.demo_results import WAYS, Asked
from kvstrata.errors import UsageError
from kvstrata.testing.others import OtherWork

if TYPE_CHECKING:
    from kvstrata.testing.engine import Answer
    from kvstrata.wire.client import NodeClient

#: a prompt is computed in steps of so many tokens; documents are a whole number of them, so that
#: cold and warm split the work alike and rounding gives no reason for another token
STEP_TOKENS = 1024
CHUNK_TOKENS = 128
DOCUMENT_STEPS = (2, 3, 4, 5, 6, 7)
ANSWER_TOKENS = 16
QUESTION = "\n\nQuestion: What is the text above about, in one sentence?\n\nAnswer: The text"
OTHER_QUESTION = "\n\nQuestion: Who may have written the text above, and why?\n\nAnswer: It was"
NEXT_TURN = "\n\nQuestion: And what is it about in a single word?\n\nAnswer: The word"


class Story(ABC):
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
        self._otherwise: list[list[int]] = []  # another question about the same document
        self._next_turn: list[int] = []
        self.asked: list[Asked] = []
        self.machine: dict[str, Any] = {}
        self.others = OtherWork()

    @abstractmethod
    def run(self) -> None:
        """All of it.

        Raises:
            UsageError: the engine or the model cannot be had, or a hit came from elsewhere than
                it is said to.
        """

    def _read_documents(self, model: Path, beyond: int | None = None) -> Any:
        """Make the prompts; returns the tokenizer.

        Args:
            beyond: tokens of a prompt beyond whole steps; None: as many as the question has.
        """
        from transformers import AutoTokenizer

        from kvstrata.testing.models import documents

        tokenizer = AutoTokenizer.from_pretrained(model)
        question, other, self._next_turn = map(
            tokenizer.encode, (QUESTION, OTHER_QUESTION, NEXT_TURN)
        )
        longest = documents(len(self._steps), max(self._steps) * STEP_TOKENS, tokenizer)
        for number, (steps, text) in enumerate(zip(self._steps, longest, strict=True), 1):
            room = steps * STEP_TOKENS + (len(question) if beyond is None else beyond)
            prompt = [*text[: room - len(question)], *question]
            self._prompts.append(prompt)
            self._otherwise.append([*prompt[: room - len(question)], *other])
            self.asked.append(Asked(number, len(prompt)))
        self._warm_up = [*documents(1, STEP_TOKENS, tokenizer, seed=1)[0], *question]
        return tokenizer

    def _say(self, text: str) -> None:
        typer.echo(f"[{time.monotonic() - self._began:5.0f} s] {text}", err=True)

    def _ask(
        self,
        way: str,
        answer: Callable[[Sequence[int], int], Answer],
        client: NodeClient,
        asked: Asked,
        prompt: Sequence[int],
        cached: int,
    ) -> None:
        """Have a prompt answered, and see that it came from where it is said to.

        Args:
            way: one of `kvstrata.cli.demo_results.WAYS`.
            answer: an engine's own; takes the prompt and how many tokens to answer with.
            client: of the node.
            asked: takes the answer.
            prompt: token ids.
            cached: tokens of it that are not computed.
        Raises:
            UsageError: it came from elsewhere.
        """
        before = hits(client)
        heard = answer(prompt, ANSWER_TOKENS)
        asked.heard(way, heard.first_s, heard.tokens)
        about = f"document {asked.number}, {WAYS[way]}: "
        if heard.cached_tokens != cached:
            raise UsageError(
                f"{about}{heard.cached_tokens} tokens were cached, {cached} expected; "
                "`kvstrata doctor` may say why"
            )
        hit = {tier for tier, count in hits(client).items() if count > before[tier]}
        if way in before and hit != {way}:
            raise UsageError(f"{about}it came from {' and '.join(sorted(hit)) or 'nowhere'}")


def hits(client: NodeClient) -> dict[str, float]:
    """Chunks that a node has found so far, by tier."""
    counters = client.status()["counters"]
    return {
        tier: counters.get(f'hit_chunks_total{{tier="{tier}"}}', 0) for tier in ("host", "disk")
    }
