"""Prompts of texts that stand in other prompts too, put together so that they are found there.

A tokenizer merges what stands side by side, so the same text behind another one may become other
tokens, and tokens are what a text is found by. Here each part is tokenized by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kvstrata.blend.segments import MAX_SEGMENTS, MIN_TOKENS
from kvstrata.errors import UsageError


class Tokenizer(Protocol):
    """What is needed of one; transformers' are such."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]: ...


def build(
    tokenizer: Tokenizer,
    parts: Sequence[str],
    *,
    plan: str | None = None,
    ratio: float | None = None,
    bound: float | None = None,
    quality: str | None = None,
    start: Sequence[int] | None = None,
) -> tuple[list[int], dict[str, Any]]:
    """Put a prompt together out of an instruction, texts and a question.

    Args:
        tokenizer: the model's.
        parts: in order. All but the last one, which is this request's own, are named; those of
            fewer than 16 tokens are not.
        plan, ratio, bound, quality: as of the hint ``blend``; none: the texts are only named.
        start: ids to begin with; None: the tokenizer's beginning of a text, if it has one.
    Returns:
        The prompt's token ids, and ``kv_transfer_params`` to send with them.
    Raises:
        UsageError: there is no part, or there are more texts than a request may name.
    """
    if not parts:
        raise UsageError("a prompt of no parts")
    if start is None:
        beginning = getattr(tokenizer, "bos_token_id", None)
        adds = list(tokenizer.encode("", add_special_tokens=True))
        start = adds if beginning in adds else []
    tokens, segments = list(start), list[tuple[int, int]]()
    for part in parts[:-1]:
        ids = tokenizer.encode(part, add_special_tokens=False)
        if len(ids) >= MIN_TOKENS:
            segments.append((len(tokens), len(tokens) + len(ids)))
        tokens += ids
    tokens += tokenizer.encode(parts[-1], add_special_tokens=False)
    if len(segments) > MAX_SEGMENTS:
        raise UsageError(f"{len(segments)} texts; {MAX_SEGMENTS} at most")
    said = {"plan": plan, "ratio": ratio, "bound": bound, "quality": quality}
    blend: dict[str, Any] = {"segments": [list(segment) for segment in segments]}
    blend |= {name: value for name, value in said.items() if value is not None}
    return tokens, {"kvstrata": {"blend": blend}} if segments else {}
