"""The second turn of a chat in transformers, by the model alone and from host memory, in pairs."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from benchmarks.common import (
    CHUNK_TOKENS,
    DOCUMENT_TOKENS,
    Options,
    Prompts,
    Row,
    expect,
    main,
    milliseconds,
    say,
    spread,
)
from transformers import AutoModelForCausalLM

from kvstrata.connectors.transformers import attach
from kvstrata.testing.workplace import Workplace

NAME = "transformers_turns"
NUM_DOCUMENTS, ROUNDS = 8, 3
ANSWER_TOKENS = 24
ROUNDING = 0.25
"""Between two logits of some 16 to 32: two of bfloat16's steps."""
QUESTION = "\n\nSay it again in other words, for somebody who has never programmed.\n\nAnswer: It"


class Chat:
    """One model, which may be attached or not."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def ask(self, tokens: list[int], count: int) -> tuple[float, list[int]]:
        """Seconds, and prompt and answer."""
        began = time.perf_counter()
        found = self.model.generate(
            torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        return time.perf_counter() - began, found[0].tolist()

    def compare(self, cold: list[int], warm: list[int]) -> None:
        """Two answers of one token are the same, or equally good as far as bfloat16 can tell."""
        expect(cold[:-1] == warm[:-1], "another prompt")
        if cold != warm:
            with torch.no_grad():
                found = self.model(torch.tensor([cold[:-1]]), logits_to_keep=1)
            logits = found.logits[0, -1].float()
            gap = float(logits[cold[-1]] - logits[warm[-1]])
            expect(gap <= ROUNDING, f"another answer: {warm[-1]}, not {cold[-1]}, by {gap:.3f}")


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    prompts = Prompts(options.seed)
    question = prompts.tokenizer.encode(QUESTION, add_special_tokens=False)
    count, rounds = (2, 1) if options.quick else (NUM_DOCUMENTS, ROUNDS)
    model = AutoModelForCausalLM.from_pretrained(prompts.model, dtype=torch.bfloat16).eval()
    model.generation_config.pad_token_id = 0
    chat = Chat(model)
    cold: list[float] = []
    warm: list[float] = []
    with Workplace(prompts.model, {"host.capacity": "1GiB", "planner": "off"}, True) as place:
        settings: dict[str, Any] = dict(place.connector["kv_connector_extra_config"])
        firsts = prompts.make(count + 1)  # the last one is to warm up
        with attach(model, **settings) as attached:
            turns = []
            for first in firsts:
                _, answered = chat.ask(first, ANSWER_TOKENS)
                expect(attached.flush(), "a first turn was not stored")
                turns.append([*answered, *question])
        known = (len(firsts[0]) + ANSWER_TOKENS - 1) // CHUNK_TOKENS * CHUNK_TOKENS
        numbers = [count, *list(range(count)) * rounds]
        for place_in_turn, number in enumerate(numbers):
            pair: dict[str, float] = {}
            tokens: dict[str, list[int]] = {}
            order = ("cold", "warm") if place_in_turn % 2 else ("warm", "cold")
            for which in order:
                if which == "cold":
                    pair[which], tokens[which] = chat.ask(turns[number], 1)
                    continue
                # What it takes to attach is no part of a turn.
                with attach(model, **settings) as attached:
                    pair[which], tokens[which] = chat.ask(turns[number], 1)
                    loaded = attached.last.loaded_tokens
                    expect(loaded == known, f"{loaded} tokens were loaded, not {known}")
            chat.compare(tokens["cold"], tokens["warm"])
            if place_in_turn:
                cold.append(pair["cold"])
                warm.append(pair["warm"])
    say(milliseconds("cold", cold))
    say(milliseconds("from host memory", warm))
    ratio = spread(one / other for one, other in zip(cold, warm, strict=True))
    length = sum(map(len, turns[:count])) / count
    return [
        Row(
            NAME,
            f"a second turn of {length:,.0f} tokens, cold / from host memory",
            ratio.median,
            5.0,
            at_most=False,
            detail=f"{ratio}; documents of {DOCUMENT_TOKENS:,} tokens",
        )
    ]


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
