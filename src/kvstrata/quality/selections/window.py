"""One context, many questions: the exact cache's answers once, then those of every smaller one.

The context is compressed before any question is known, and all questions are then asked on the one
cache that came of it (the multi-request mode of SCBench, arXiv:2412.10319).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.base import Codec
from kvstrata.codecs.elements import Floats
from kvstrata.layout import Elements
from kvstrata.quality import metrics, tasks
from kvstrata.quality.coding import CHUNK_TOKENS, through
from kvstrata.quality.models import Model
from kvstrata.selection.kept import Kept, payload_bytes
from kvstrata.selection.masked import masked, spread_out

FACTS = 8
"""Facts in a context; with the rules there are twice as many questions on one cache."""

CONTINUATION = 128
"""Tokens of real text that follow a context."""


@dataclass(frozen=True)
class Answered:
    """What one cache of a context answered; see `kvstrata.quality.selections.table.Row`.

    Args:
        bits: of an element of the whole context, positions and counts included.
        loss: nats a token of the continuation, less those on the exact cache.
        kl: mean of the continuation's positions, nats.
        questions: of each question, the facts' first, the mean KL of its answer's positions.
        agreement: share of the continuation's positions.
        exact_found, found: for each fact, whether it was told.
        rules: for each rule, share of the answer's positions with the exact cache's token.
    """

    bits: float
    loss: float
    kl: float
    questions: list[float]
    agreement: float
    exact_found: list[bool]
    found: list[bool]
    rules: list[float]


class Window:
    """A context with its questions and the text that follows, and the exact cache's answers.

    Args:
        model: that answers.
        ids: tokens of prose: the context's length, the continuation and one more.
        length: of the context, a whole number of chunks.
        seed: of the tasks.
    Attributes:
        tokens: of the context.
        kv: (L, 2, H, T, D), words of bfloat16.
    """

    def __init__(self, model: Model, ids: Sequence[int], length: int, seed: int) -> None:
        self._model = model
        asked = tasks.context(model.tokenizer, ids, (length,), seed, FACTS)
        self.tokens = asked.ids
        self._facts = asked.facts
        self._questions = [*asked.facts, *asked.rules]
        following = ids[asked.prose : asked.prose + CONTINUATION + 1]
        self._text, self._following = following[:-1], following[1:]
        self.kv = model.prefill(self.tokens)
        self._exact = self._answers(self.kv, None)

    def exact_found(self) -> list[bool]:
        """For each fact, whether the exact cache tells it."""
        return self._told(self._exact)

    def exact_loss(self) -> float:
        """Nats a token of the continuation on the exact cache."""
        return metrics.loss(self._exact[0], self._following)

    def coded(self, codec: Codec) -> Answered:
        """What a codec does to the answers, with every token kept.

        Raises:
            LayoutMismatch: the codec does not take this model's KV.
        """
        coded = through(codec, self.kv)
        return self._compare(coded.kv, None, coded.bits(len(self.tokens)))

    def selected(self, kept: Kept) -> Answered:
        """What a selection does to them."""
        kv, there = spread_out(kept)
        nbytes = payload_bytes(kept.shape(), kept.dtype)
        return self._compare(kv, there, 8 * nbytes / self.kv.size)

    def _compare(self, kv: Elements, kept: npt.NDArray[np.bool_] | None, bits: float) -> Answered:
        exact, other = self._exact, self._answers(kv, kept)
        pairs = list(zip(exact[1:], other[1:], strict=True))
        return Answered(
            bits,
            metrics.loss(other[0], self._following) - metrics.loss(exact[0], self._following),
            float(metrics.divergence(exact[0], other[0]).mean()),
            [float(metrics.divergence(here, there).mean()) for here, there in pairs],
            metrics.agreement(other[0], exact[0].argmax(axis=-1)),
            self._told(exact),
            self._told(other),
            [
                metrics.agreement(there, here.argmax(axis=-1))
                for here, there in pairs[len(self._facts) :]
            ],
        )

    def _told(self, answers: list[Floats]) -> list[bool]:
        """Whether greedy decoding gives each fact's whole answer."""
        facts = zip(answers[1:], self._facts, strict=False)
        return [metrics.agreement(found, fact.answer) == 1 for found, fact in facts]

    def _answers(self, kv: Elements, kept: npt.NDArray[np.bool_] | None) -> list[Floats]:
        """Of the continuation, then of every question: (positions, vocabulary), logarithms."""
        questions = self._questions
        branches = self._model.branches(kv, 1 + len(questions))
        # The last token of an answer is predicted, not read.
        read = [self._text, *([*question.ids, *question.answer[:-1]] for question in questions)]
        wanted = [len(self._text), *(len(question.answer) for question in questions)]
        if kept is None:
            return branches.append(read, wanted)
        with masked(self._model.causal, kept):
            return branches.append(read, wanted)


def check_length(length: int) -> bool:
    """Whether codecs can take a context of so many tokens whole."""
    return length > 0 and length % CHUNK_TOKENS == 0
