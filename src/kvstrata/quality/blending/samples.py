"""What one window shows of every way: answers from its cache beside those from the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.elements import Floats
from kvstrata.layout import Elements
from kvstrata.quality import metrics
from kvstrata.quality.blending.prompts import Prompt
from kvstrata.quality.blending.ways import Made, Way


@dataclass(frozen=True)
class Sample:
    """One way on one window; see `kvstrata.quality.blending.table.Row`.

    Args:
        computed: share of the reused tokens.
        kl: of each position of the continuation, nats.
        loss: nats a token of the continuation, less those on the exact cache.
        agreement: share of positions.
        answer_nats: for each document in the asked order, nats a token of its fact's answer, less
            those on the exact cache.
        found: for each document in that order, whether its fact was told.
    """

    computed: float
    kl: npt.NDArray[np.float64]
    loss: float
    agreement: float
    answer_nats: list[float]
    found: list[bool]


class Window:
    """A prompt with the exact cache's answers.

    Args:
        prompt: with all that is asked of it.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        asked = prompt.asked.documents
        # The last token of a text or an answer is predicted, not read.
        self._steps = [
            prompt.following[:-1],
            *(prompt.questions[number] + prompt.answers[number][:-1] for number in asked),
        ]
        self._text = prompt.following[1:]
        self._answers = [prompt.answers[number] for number in asked]
        self._keep = [len(self._text), *map(len, self._answers)]
        self._exact = self._answer(prompt.exact, None, range(len(self._steps)))
        self.loss = metrics.loss(self._exact[0], self._text)
        self.found = self._told(self._exact)

    def sample(self, way: Way) -> Sample:
        """What one way does to this window."""
        if way.by_question:
            questions = [self._prompt.following[:1], *self._questions()]
            each = [way.make(self._prompt, question) for question in questions]
            found = [self._answer(made.kv, made, [number])[0] for number, made in enumerate(each)]
            computed = float(np.mean([made.computed for made in each]))
        else:
            made = way.make(self._prompt, [])
            found, computed = self._answer(made.kv, made, range(len(self._steps))), made.computed
        exact = self._exact
        pairs = zip(exact[1:], found[1:], self._answers, strict=True)
        return Sample(
            computed=computed,
            kl=metrics.divergence(exact[0], found[0]),
            loss=metrics.loss(found[0], self._text) - self.loss,
            agreement=metrics.agreement(found[0], exact[0].argmax(axis=-1)),
            answer_nats=[
                metrics.loss(there, answer) - metrics.loss(here, answer)
                for here, there, answer in pairs
            ],
            found=self._told(found),
        )

    def _questions(self) -> list[list[int]]:
        return [self._prompt.questions[number] for number in self._prompt.asked.documents]

    def _answer(self, kv: Elements, made: Made | None, which: Sequence[int]) -> list[Floats]:
        """For each of these steps, logarithms of probabilities of what it is to predict."""
        branches = self._prompt.model.branches(kv, len(which), made.start if made else None)
        steps, keep = [self._steps[i] for i in which], [self._keep[i] for i in which]
        if made is None:
            return branches.append(steps, keep)
        with made.attention():
            return branches.append(steps, keep)

    def _told(self, found: Sequence[Floats]) -> list[bool]:
        return [
            metrics.agreement(predicted, answer) == 1
            for predicted, answer in zip(found[1:], self._answers, strict=True)
        ]
