"""One window: documents that were computed in one order, and asked for in another."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.elements import Floats
from kvstrata.errors import UsageError
from kvstrata.layout import Elements
from kvstrata.quality import tasks
from kvstrata.quality.blending import rows
from kvstrata.quality.models import Model

CONTINUATION = 64
"""Tokens of real text that follow the last document."""

OBSERVED = 2
"""Prompts besides the stored one that the documents were computed in before, for `anchors`."""

_HEAD = "Some documents about programming follow. Answer from them.\n\n"


@dataclass(frozen=True)
class Order:
    """A prompt of the head and the documents in some order.

    Args:
        documents: their numbers, first to last.
        ids: tokens of the whole prompt.
        places: of each document by its number, its tokens' positions.
    """

    documents: tuple[int, ...]
    ids: list[int]
    places: tuple[range, ...]

    @classmethod
    def of(cls, head: list[int], documents: Sequence[list[int]], order: Sequence[int]) -> Order:
        """Head and documents in this order."""
        ids, places = list(head), [range(0)] * len(documents)
        for number in order:
            places[number] = range(len(ids), len(ids) + len(documents[number]))
            ids += documents[number]
        return cls(tuple(order), ids, tuple(places))


class Prompt:
    """A prompt whose documents are there from other prompts.

    Args:
        model: that answers.
        turning: of its keys.
        strips: for each document its tokens and those of the text behind it.
        length: tokens of each document.
        seed: of the orders, and of the facts that are planted.
    Attributes:
        head: tokens that all prompts begin with, so that they are exact.
        asked: the prompt that is answered.
        stored: the prompt whose KV is reused.
        questions, answers: about a fact in each document, by number: tokens.
        following: tokens of the text behind the asked prompt.
    """

    def __init__(
        self,
        model: Model,
        turning: rows.Turning,
        strips: Sequence[Sequence[int]],
        length: int,
        seed: int,
    ) -> None:
        rng = random.Random(seed)
        self.model = model
        self.seed = seed
        self._turning = turning
        encode = functools.partial(_tokens, model.tokenizer)
        head = [*model.tokenizer.encode(""), *encode(_HEAD)]
        self.head = len(head)
        cities = rng.sample(tasks.CITIES, len(strips))
        self.questions, self.answers, documents = [], [], []
        for strip, city in zip(strips, cities, strict=True):
            number = rng.randrange(10_000, 100_000)
            told = encode(f"\n\nThe secret number of {city} is {number}.\n\n")
            before = (length - len(told)) // 2
            if before < 1:
                raise UsageError(f"documents of {length} tokens are too short for a fact")
            # What is planted pushes out the document's beginning, so that its text ends as it did
            # and goes on behind it.
            prose = list(strip[len(told) : length])
            documents.append(prose[:before] + told + prose[before:])
            self.questions.append(encode(f"\n\nThe secret number of {city} is"))
            self.answers.append(encode(f" {number}"))
        orders = [tuple(range(len(strips)))]
        orders += [_moved(rng, len(strips)) for _ in range(OBSERVED)]
        self.stored, *self.observed, self.asked = (
            Order.of(head, documents, order) for order in orders
        )
        self.following = list(strips[self.asked.documents[-1]][length:])

    @functools.cached_property
    def exact(self) -> Elements:
        """(L, 2, H, T, D), words of bfloat16: the asked prompt, computed."""
        return self.model.prefill(self.asked.ids)

    @functools.cached_property
    def reused(self) -> list[range]:
        """Positions of the documents in the asked prompt, ascending."""
        return [self.asked.places[number] for number in self.asked.documents]

    @functools.cached_property
    def num_reused(self) -> int:
        """How many tokens that are."""
        return sum(map(len, self.reused))

    @functools.cached_property
    def loaded(self) -> Elements:
        """The stored documents' KV in the asked order, keys turned; the head is exact."""
        return self.carried(self.stored, self._stored_kv)

    @functools.cached_property
    def unturned(self) -> Elements:
        """`loaded` with the keys as they were stored."""
        return self._moved(self.stored, self._stored_kv)[0]

    @functools.cached_property
    def other_loads(self) -> list[Elements]:
        """The same of the documents' KV from each of the other prompts."""
        return [self.carried(one, self.model.prefill(one.ids)) for one in self.observed]

    @functools.cached_property
    def deviation(self) -> Floats:
        """Of each reused token; see `kvstrata.quality.blending.rows.deviation`."""
        return rows.deviation(self.model, self.loaded, self.asked.ids, self.reused)

    def carried(self, order: Order, kv: Elements) -> Elements:
        """KV of another order of the same documents, in the asked one, keys turned."""
        moved, was, now = self._moved(order, kv)
        return self._turning.turned(moved, was, now)

    @functools.cached_property
    def _stored_kv(self) -> Elements:
        return self.model.prefill(self.stored.ids)

    def _moved(
        self, order: Order, kv: Elements
    ) -> tuple[Elements, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows in the asked order, and the positions that they had and have."""
        was = list(range(self.head))
        for number in self.asked.documents:
            was += order.places[number]
        places = np.array(was)
        return np.ascontiguousarray(kv[:, :, :, places]), places, np.arange(len(places))


def _moved(rng: random.Random, count: int) -> tuple[int, ...]:
    """An order in which no document stands where it was stored."""
    while True:
        order = rng.sample(range(count), count)
        if count < 2 or all(place != number for place, number in enumerate(order)):
            return tuple(order)


def prompts(
    model: Model, turning: rows.Turning, text: str, documents: int, length: int, count: int
) -> list[Prompt]:
    """The windows of a text.

    Args:
        model: that answers.
        turning: of its keys.
        text: real prose.
        documents: in each window.
        length: tokens of each.
        count: windows.
    Raises:
        UsageError: the text is too short.
    """
    strip = length + CONTINUATION + 1
    first = len(model.tokenizer.encode(""))
    pieces = tasks.windows(model.tokenizer, text, first + documents * strip, count)
    return [
        Prompt(
            model,
            turning,
            [piece[first + i * strip : first + (i + 1) * strip] for i in range(documents)],
            length,
            seed,
        )
        for seed, piece in enumerate(pieces)
    ]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
