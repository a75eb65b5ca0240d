"""What reuse to the last token gains over vLLM's own prefix hit, whose blocks have 128 tokens here.

Two cases, at lengths that are spread evenly over a chunk: the same document with another question,
and the next turn of a chat. Every comparison is made inside one engine, in pairs. A model of full
attention, and one with windows beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    CHUNK_TOKENS,
    Ledger,
    Options,
    Prompts,
    Row,
    expect,
    main,
    milliseconds,
    say,
    spread,
)

from kvstrata.testing.engine import Answer, Engine
from kvstrata.testing.models import gemma3, smollm2
from kvstrata.testing.workplace import Workplace

NAME = "inside"
SHORTEST = 2816  # 22 chunks; the first one to end there has 5 tokens more
ANSWER_TOKENS = 16
MARK_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """A model to measure with.

    Args:
        name: what its rows begin with.
        folder: makes it.
        bound: what the ratios must reach; None: they are told.
        options: of vLLM.
    """

    name: str
    folder: Callable[[], Path]
    bound: float | None
    options: Mapping[str, Any]


CASES = (
    Case("", smollm2, 0.90, {"max_num_batched_tokens": 4096}),
    # vLLM itself keeps a window at the end of a prompt only, unless it is told to.
    Case("Gemma 3 270M: ", gemma3, None, {
        "max_num_batched_tokens": 4096, "max_model_len": 4096,
        "prefix_cache_retention_interval": CHUNK_TOKENS,
    }),
)  # fmt: skip


@dataclass
class Asked:
    """Of one case: seconds to the first token, tokens that were computed again, other answers."""

    floor: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    differing: int = 0

    def rows(self, case: str, bound: float | None) -> list[Row]:
        """The figures of the case, and its percentiles as progress."""
        say(f"{case}:")
        say("  " + milliseconds("vLLM's own hit", self.floor))
        say("  " + milliseconds("from KVStrata", self.warm))
        ratio = spread(w / f for w, f in zip(self.warm, self.floor, strict=True))
        same = len(self.warm) - self.differing
        return [
            Row(
                NAME,
                f"{case}, from KVStrata / vLLM's own prefix hit",
                ratio.median,
                bound,
                detail=f"{ratio}; the first token is the same in {same} of {len(self.warm)}, "
                "the others are split, and so rounded, otherwise",
            ),
            Row(
                NAME,
                f"{case}, tokens computed beyond the new ones, at most",
                float(max(self.again)),
                float(MARK_TOKENS),
                unit="tokens",
                detail=f"mean {sum(self.again) / len(self.again):.1f}; vLLM alone would compute "
                f"{CHUNK_TOKENS // 2} in the mean",
            ),
        ]


class Asker:
    """Asks one engine, with its connector and without, and proves what each answer was made of."""

    def __init__(self, engine: Engine, ledger: Ledger) -> None:
        self.engine = engine
        self.ledger = ledger
        self._num_groups: int = engine.wait()["num_groups"]

    def known(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Have the node, and vLLM itself, know a prompt and its answer; the tokens of both."""
        self.engine.attach()
        stored = self.ledger.stored()
        answer = self.engine.ask(prompt, max_tokens)
        (record,) = self.ledger.next()
        chunks, rest = divmod(len(prompt) + max_tokens - 1, CHUNK_TOKENS)
        if not record["loaded_tokens"] and not answer.cached_tokens:
            count = chunks + (rest >= MARK_TOKENS)
            self.ledger.drain(stored + count * self._num_groups)
        return [*prompt, *answer.tokens]

    def pair(self, before: Sequence[int], prompt: Sequence[int], asked: Asked, turn: int) -> None:
        """Ask what follows something known, from vLLM's own cache and from KVStrata."""
        common = in_common(before, prompt)
        answers: dict[str, Answer] = {}
        for side in ("own", "node") if turn % 2 else ("node", "own"):
            self.engine.reset_prefix_cache()
            if side == "own":
                self._own(before)
            else:
                self.engine.attach()
            answers[side] = self.engine.ask(prompt)
            if side == "node":
                (record,) = self.ledger.next()
        self.engine.attach()
        own, node = answers["own"], answers["node"]
        loaded = record["loaded_tokens"]
        whole = common // CHUNK_TOKENS * CHUNK_TOKENS
        expect(own.cached_tokens == whole, f"vLLM found {own.cached_tokens} tokens, not {whole}")
        expect(node.cached_tokens == loaded, f"{node.cached_tokens} cached, {loaded} loaded")
        expect(loaded <= common, f"{loaded} tokens were loaded, of {common} in common")
        asked.floor.append(own.first_s)
        asked.warm.append(node.first_s)
        asked.again.append(common - loaded)
        asked.differing += own.tokens != node.tokens

    def _own(self, before: Sequence[int]) -> None:
        """Have vLLM itself know a prompt, and take the connector out."""
        if self._num_groups == 1:
            self.known(before, 1)
        self.engine.detach()
        if self._num_groups > 1:  # of a window it keeps what it computed, not all that was loaded
            self.engine.ask(before)


def in_common(these: Sequence[int], those: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(these, those, strict=False))
    )


def lengths(count: int) -> list[int]:
    """So many, spread evenly over a chunk; none a multiple of 16."""
    return [SHORTEST + number * CHUNK_TOKENS // count + 5 for number in range(count)]


def question(prompts: Prompts, number: int) -> list[int]:
    """Another one for each number, of about as many tokens."""
    text = f"{number:03d}. What does the text above say of this, in a few words, and why does it?"
    tokens: list[int] = prompts.tokenizer.encode(f"\n\nQuestion {text}\n\nAnswer: The")
    return tokens


def documents(
    asker: Asker, prompts: Prompts, count: int, rounds: int, collection: int = 10
) -> Asked:
    """The same documents with other questions, none of them asked before."""
    asked = Asked()
    texts = [prompts.make(1, collection=collection + i, tokens=n)[0][:n]
             for i, n in enumerate(lengths(count))]  # fmt: skip
    first = [[*text, *question(prompts, 0)] for text in texts]
    for prompt in first:
        asker.engine.reset_prefix_cache()
        asker.known(prompt, 1)
    for turn in range(rounds):
        for number, text in enumerate(texts):
            other = question(prompts, 1 + turn * count + number)
            asker.pair(first[number], [*text, *other], asked, turn)
    return asked


def chats(asker: Asker, prompts: Prompts, count: int, rounds: int) -> Asked:
    """Chats that go on: what was said and answered, then something new."""
    asked = Asked()
    for turn in range(rounds):
        for number, length in enumerate(lengths(count)):
            text = prompts.make(1, collection=100 + turn * count + number, tokens=length)[0]
            asker.engine.reset_prefix_cache()
            said = asker.known(text[:length], ANSWER_TOKENS)
            # Of the last token of the answer there is no KV.
            asker.pair(said[:-1], [*said[:-1], *question(prompts, turn)], asked, turn)
    return asked


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    return [row for case in CASES for row in measure_case(options, case)]


def measure_case(options: Options, case: Case) -> list[Row]:
    """Those of one model."""
    prompts = Prompts(options.seed, model=case.folder())
    count, rounds = (4, 1) if options.quick else (16, 4)
    settings = {"host.capacity": "4GiB", "inside": "on"}
    with Workplace(prompts.model, settings) as place:
        engine = place.engine(options=dict(case.options))
        tokens = engine.wait()["block_tokens"]
        expect(tokens == CHUNK_TOKENS, f"blocks of {tokens} tokens")
        asker = Asker(engine, Ledger(place.client()))
        documents(asker, prompts, 1, 2, collection=1)  # the first steps of a process are slow
        asked = documents(asker, prompts, count, rounds)
        rows = asked.rows(f"{case.name}long-document QA, another question", case.bound)
        asked = chats(asker, prompts, count, rounds)
        return rows + asked.rows(f"{case.name}next turn of a chat", case.bound)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
