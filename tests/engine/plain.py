"""What plain vLLM answers, which every answer is compared with, and the prompts to ask."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from tests.engine.engine import CHUNK, Answer, Engine, Prompt, whole_chunks

from kvstrata.testing import models

# Shorter than a chunk, one token around its ends, and up to twelve chunks; no whole multiples,
# whose hit vLLM cuts otherwise than we do.
LENGTHS = (
    40, 90, 127, 129, 130, 140, 160, 191, 200, 230, 254, 255, 257, 270, 300, 310, 330, 345, 383,
    385, 400, 420, 450, 500, 511, 513, 560, 600, 641, 700, 769, 900, 1100, 1500,
)  # fmt: skip


class Texts:
    """Prompts of real text, no two of which begin alike.

    Args:
        tokenizer: a Hugging Face tokenizer.
        owner: whose texts these are. Another owner has others, so that tests which share a node
            never hit on each other's; the same owner has the same ones in every run.
    """

    def __init__(self, tokenizer: models.Tokenizer, owner: str) -> None:
        self._tokenizer = tokenizer
        self._owner = owner
        self._number = 0

    def of(self, *lengths: int) -> list[Prompt]:
        """New prompts of these lengths."""
        self._number += 1
        seed = zlib.crc32(f"{self._owner} {self._number}".encode())
        cut = models.documents(len(lengths), max(lengths), self._tokenizer, seed)
        return [list(text[:length]) for text, length in zip(cut, lengths, strict=True)]


class Plain:
    """Plain vLLM's answers, each asked for once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._known: dict[tuple[int, ...], tuple[Answer, Answer]] = {}

    def both(self, prompt: Prompt) -> tuple[Answer, Answer]:
        """The answer when nothing is cached, and upon vLLM's hit in its own prefix cache."""
        key = tuple(prompt)
        if key not in self._known:
            # It may have been asked before, up to some other split.
            self.engine.forget()
            cold, warm = self.engine.answers([prompt, prompt])
            assert cold.cached == 0
            self._known[key] = cold, warm
        return self._known[key]

    def upon_hit(self, prompt: Prompt, num_tokens: int) -> tuple[Answer, Answer]:
        """The answer when vLLM's own prefix cache has so many of its tokens, and the one after.

        What is computed after a hit may be rounded otherwise than what is computed at once, so the
        second answer, upon a hit of everything, is not always the one of `both`.
        """
        if num_tokens == 0:
            return self.both(prompt)
        self.engine.forget()
        self.engine.answer(prompt, 1)
        self.engine.call("evict", tokens=prompt, keep=num_tokens // CHUNK)
        first, second = self.engine.answers([prompt, prompt])
        assert first.cached == num_tokens
        return first, second

    def cold(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens without any hit."""
        return [self.both(prompt)[0].tokens for prompt in prompts]

    def warm(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens where all whole chunks of the prompt are hit."""
        answers = [self.both(prompt)[1] for prompt in prompts]
        assert [answer.cached for answer in answers] == [whole_chunks(len(p)) for p in prompts]
        return [answer.tokens for answer in answers]
