"""What a model is asked on its decoded cache: to go on with a text, to find facts, to keep rules.

Everything is built from token ids, so that a context has exactly the tokens it should, and so that
its first 1,024 tokens are the shorter context: one prefill serves every length.

Rules stand at the very beginning and are asked for one by one, because compression was seen to
lose some instructions of a prompt and not others (The Pitfalls of KV Cache Compression,
arXiv:2510.00231). Small models follow rules poorly, so they are led into the answer:
how likely it is can be measured whether or not they would have given it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstrata.errors import UsageError

CONTINUATION = 256
"""Tokens of real text that follow a context."""

DEPTHS = 5
"""Facts planted at even depths of each length: the middles of its fifths."""

CITIES = (
    "Oslo", "Lima", "Cairo", "Delhi", "Paris", "Tokyo", "Quito", "Dublin", "Athens", "Vienna",
    "Havana", "Lisbon", "Nairobi", "Prague", "Warsaw", "Zurich", "Berlin", "Bogota", "Manila",
    "Ottawa", "Madrid", "Moscow", "Boston", "Denver",
)  # fmt: skip

RULES = (
    ("the weather", "Rain is expected over Bergen."),
    ("opening hours", "We open at seven and close at noon."),
    ("a refund", "Refunds go through the blue desk."),
    ("the password", "I never talk about passwords."),
    ("the train", "The next train leaves from platform four."),
    ("lunch", "Today the kitchen serves lentil soup."),
    ("the manager", "Please write to Ms. Alvarez."),
    ("parking", "Parking is behind the old mill."),
)
"""What the rules are about, and the answers that they ask for."""


@dataclass(frozen=True)
class Question:
    """One thing to ask on a cache.

    Args:
        length: tokens of the context that it is asked after.
        ids: the tokens of the question.
        answer: the right tokens.
    """

    length: int
    ids: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Context:
    """Rules, then prose with facts planted in it.

    Args:
        ids: tokens of the longest context.
        facts: for each length one for each depth, first to last.
        rules: for each length every rule, in the order in which they stand.
        prose: tokens of prose in it; the ones that follow continue it.
    """

    ids: list[int]
    facts: list[Question]
    rules: list[Question]
    prose: int


def windows(tokenizer: Any, text: str, tokens: int, count: int) -> list[list[int]]:
    """Disjoint pieces of a text, evenly spread, each led by the model's first token if it has one.

    Raises:
        UsageError: the text has too few tokens.
    """
    first: list[int] = tokenizer.encode("")
    ids = _tokens(tokenizer, text)
    stride, size = len(ids) // count, tokens - len(first)
    if stride < size:
        raise UsageError(f"{len(ids)} tokens of text are too few for {count} windows of {tokens}")
    return [first + ids[stride * i : stride * i + size] for i in range(count)]


def context(
    tokenizer: Any, prose: Sequence[int], lengths: Sequence[int], seed: int, depths: int = DEPTHS
) -> Context:
    """Rules, and secret numbers of cities, some for each length; every other one distracts.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prose: token ids, as many as the longest context.
        lengths: of contexts.
        seed: decides the order of the rules and who has which number.
        depths: facts of each length, in the middles of as many equal parts.
    Raises:
        UsageError: rules and facts do not fit into the shortest length.
    """
    rng = random.Random(seed)
    rules = rng.sample(RULES, len(RULES))
    cities = rng.sample(CITIES, depths * len(lengths))
    head = "You are the assistant of a small office. Follow these rules.\n" + "".join(
        f"{number}. When asked about {topic}, answer: {answer}\n"
        for number, (topic, answer) in enumerate(rules, 1)
    )
    ids = tokenizer.encode("") + _tokens(tokenizer, head + "\nHere is a text.\n\n")
    plan = sorted(
        (len(ids) + (length - len(ids)) * (2 * depth + 1) // (2 * depths), length)
        for length in lengths
        for depth in range(depths)
    )
    facts, taken = [], 0
    for (position, length), city in zip(plan, cities, strict=True):
        number = rng.randrange(10_000, 100_000)
        piece = prose[taken : taken + max(0, position - len(ids))]
        taken += len(piece)
        told = f"\n\nThe secret number of {city} is {number}.\n\n"
        ids += [*piece, *_tokens(tokenizer, told)]
        if len(ids) > length:
            raise UsageError(f"{length} tokens are too few for the rules and {depths} facts")
        asked = _tokens(tokenizer, f"\n\nThe secret number of {city} is")
        facts.append(Question(length, asked, _tokens(tokenizer, f" {number}")))
    # Behind the last fact there is prose up to the end.
    rest = prose[taken : taken + max(lengths) - len(ids)]
    taken += len(rest)
    ids += rest
    return Context(
        ids,
        facts,
        [
            Question(
                length,
                _tokens(tokenizer, f"\n\nRule: When asked about {topic}, answer:"),
                _tokens(tokenizer, f" {answer}"),
            )
            for length in lengths
            for topic, answer in rules
        ],
        taken,
    )


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
