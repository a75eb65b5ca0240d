"""One window of text: the exact cache's answers once, then those of every codec's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.base import Codec
from kvstrata.codecs.elements import Floats
from kvstrata.errors import CorruptObject
from kvstrata.layout import Elements
from kvstrata.quality import metrics, tasks
from kvstrata.quality.coding import Coded, through
from kvstrata.quality.models import Model


@dataclass(frozen=True)
class Answers:
    """Logarithms of probabilities, each (tokens, vocabulary), after a context of one length.

    Args:
        text: for each token of the continuation, of the token after it.
        facts, rules: for each question, of the tokens of its answer.
    """

    text: Floats
    facts: list[Floats]
    rules: list[Floats]


@dataclass(frozen=True)
class Sample:
    """One codec on one window at one length; see `kvstrata.quality.table.Scores`.

    Args:
        length: tokens of the context.
        bits, key_error, value_error: of the coded prose.
        loss: nats a token of the continuation, less those on the exact cache.
        kl: of each position, nats.
        agreement: share of positions.
        exact_found, found: for each depth, whether the fact was told.
        rules: for each rule, share of the answer's positions with the exact cache's token.
        rules_nats: for each rule, nats a token that the answer it asks for is less likely.
    """

    length: int
    bits: float
    key_error: float
    value_error: float
    loss: float
    kl: npt.NDArray[np.float64]
    agreement: float
    exact_found: list[bool]
    found: list[bool]
    rules: list[float]
    rules_nats: list[float]


class Window:
    """The two contexts of a window, with the exact cache's answers. Their KV, (L, 2, H, T, D),
    words of bfloat16, are ``prose``, and ``asked``: the rules and the facts.

    Args:
        model: that answers.
        ids: tokens of prose: the longest length, the continuation and one more.
        lengths: of contexts, whole numbers of chunks.
        seed: of the tasks.
    """

    def __init__(self, model: Model, ids: Sequence[int], lengths: Sequence[int], seed: int) -> None:
        self._model = model
        self._ids = ids
        self._lengths = lengths
        self._tasks = tasks.context(model.tokenizer, ids, lengths, seed)
        self.prose = model.prefill(ids[: max(lengths)])
        self.asked = model.prefill(self._tasks.ids)
        self._exact = {length: self._answers(self.prose, self.asked, length) for length in lengths}

    def sample(self, codec: Codec) -> list[Sample]:
        """What a codec does to this window, for each length.

        Raises:
            LayoutMismatch: the codec does not take this model's KV.
            CorruptObject: it is called lossless and is not, or cannot read what it wrote.
        """
        prose, asked = through(codec, self.prose), through(codec, self.asked)
        if codec.lossless and not self._same(prose, asked):
            raise CorruptObject(f"{codec.name} is called lossless, and other bits came back")
        return self.compare(prose, asked)

    def compare(self, prose: Coded, asked: Coded) -> list[Sample]:
        """What answers on these caches lose, for each length.

        Args:
            prose, asked: what came back of the attributes of these names.
        """
        same = self._same(prose, asked)
        samples = []
        for length in self._lengths:
            exact = self._exact[length]
            # Equal caches give equal answers, so there is nothing to compute.
            other = exact if same else self._answers(prose.kv, asked.kv, length)
            following = self._ids[length + 1 : length + 1 + tasks.CONTINUATION]
            facts, rules = self._facts(length), self._rules(length)
            samples.append(
                Sample(
                    length,
                    prose.bits(length),
                    prose.error(length, 0),
                    prose.error(length, 1),
                    metrics.loss(other.text, following) - metrics.loss(exact.text, following),
                    metrics.divergence(exact.text, other.text),
                    metrics.agreement(other.text, exact.text.argmax(axis=-1)),
                    _told(exact.facts, facts),
                    _told(other.facts, facts),
                    [
                        metrics.agreement(there, here.argmax(axis=-1))
                        for there, here in zip(other.rules, exact.rules, strict=True)
                    ],
                    [
                        metrics.loss(there, rule.answer) - metrics.loss(here, rule.answer)
                        for there, here, rule in zip(other.rules, exact.rules, rules, strict=True)
                    ],
                )
            )
        return samples

    def exact_loss(self, length: int) -> float:
        """Nats a token of the continuation on the exact cache."""
        following = self._ids[length + 1 : length + 1 + tasks.CONTINUATION]
        return metrics.loss(self._exact[length].text, following)

    def exact_found(self, length: int) -> list[bool]:
        """For each depth, whether the exact cache tells the fact."""
        return _told(self._exact[length].facts, self._facts(length))

    def exact_rules(self, length: int) -> list[float]:
        """For each rule, the share of its answer's tokens that the exact cache predicts."""
        pairs = zip(self._exact[length].rules, self._rules(length), strict=True)
        return [metrics.agreement(found, rule.answer) for found, rule in pairs]

    def _same(self, prose: Coded, asked: Coded) -> bool:
        return np.array_equal(prose.kv, self.prose) and np.array_equal(asked.kv, self.asked)

    def _facts(self, length: int) -> list[tasks.Question]:
        return [question for question in self._tasks.facts if question.length == length]

    def _rules(self, length: int) -> list[tasks.Question]:
        return [question for question in self._tasks.rules if question.length == length]

    def _answers(self, prose: Elements, asked: Elements, length: int) -> Answers:
        branch = self._model.branches(prose[:, :, :, :length], 1)
        text = self._ids[length : length + tasks.CONTINUATION]
        (predicted,) = branch.append([text], [len(text)])
        facts = self._facts(length)
        questions = [*facts, *self._rules(length)]
        branches = self._model.branches(asked[:, :, :, :length], len(questions))
        found = branches.append(
            # The last token of an answer is predicted, not read.
            [[*question.ids, *question.answer[:-1]] for question in questions],
            [len(question.answer) for question in questions],
        )
        return Answers(predicted, found[: len(facts)], found[len(facts) :])


def _told(found: Sequence[Floats], facts: Sequence[tasks.Question]) -> list[bool]:
    """Whether greedy decoding gives the whole answer: each token, after the right ones before."""
    return [metrics.agreement(p, q.answer) == 1 for p, q in zip(found, facts, strict=True)]
