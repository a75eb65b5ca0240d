"""Documents of real English, cut to a length in tokens."""

from __future__ import annotations

import random
from typing import Protocol

from kvstrata.quality.corpus import english_text


class Tokenizer(Protocol):
    """The one method of a Hugging Face tokenizer that is used here."""

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, led by the model's first token where it has one."""
        ...


def documents(count: int, tokens: int, tokenizer: Tokenizer, seed: int = 0) -> list[list[int]]:
    """Cut distinct documents of exactly ``tokens`` tokens out of :func:`english_text`.

    Each begins with a line of its own, so no two share more than a few leading tokens, and the
    same arguments give the same documents in every process.

    Args:
        count: how many.
        tokens: length of each, in tokens, the model's own first token included.
        tokenizer: a Hugging Face tokenizer.
        seed: other seeds give documents with other first lines and other cuts.
    """
    text = english_text()
    start = random.Random(seed).randrange(len(text))
    step = len(text) // max(count, 1)
    return [
        _document(f"Document {number} of collection {seed}.\n\n", text, start, tokens, tokenizer)
        for number, start in enumerate((start + i * step) % len(text) for i in range(count))
    ]


def _document(title: str, text: str, start: int, tokens: int, tokenizer: Tokenizer) -> list[int]:
    """The title and the text from ``start`` on, round and round, cut after ``tokens`` tokens."""
    turned = text[start:] + text[:start]
    num_chars = tokens * 5
    while True:
        repeats = num_chars // len(turned) + 1
        ids = tokenizer.encode(title + (turned * repeats)[:num_chars])
        # One token is spared: the last one may be cut in the middle of a word.
        if len(ids) > tokens:
            return ids[:tokens]
        num_chars *= 2
