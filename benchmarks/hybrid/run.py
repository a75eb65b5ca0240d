"""Hits of models whose layers are of several kinds: how near to vLLM's own, and what is kept."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import (
    CHUNK_TOKENS,
    DOCUMENT_TOKENS,
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
from kvstrata.testing.models import TINY, gemma3
from kvstrata.testing.workplace import Workplace

NAME = "hybrid"
NUM_DOCUMENTS, ROUNDS = 8, 6
GEMMA_BYTES_PER_TOKEN = 18 * 2 * 1 * 256 * 2  # layers, K and V, heads, head_dim, bfloat16
STRIDE = 512
PROMPT_TOKENS = 3000


@dataclass
class Times:
    """Seconds to the first token, document by document."""

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    over_floor: list[float] = field(default_factory=list)
    over_cold: list[float] = field(default_factory=list)


class Asker:
    """Asks one engine, and proves of every answer what it was made of."""

    def __init__(self, engine: Engine, ledger: Ledger, prompts: Sequence[Any]) -> None:
        self.engine = engine
        self.prompts = prompts
        self._ledger = ledger
        self._answers: dict[int, list[int]] = {}

    def cold(self, number: int) -> Answer:
        """Computed; stored from then on."""
        answer, record = self._ask(number)
        expect(answer.cached_tokens == record["loaded_tokens"] == 0, f"{number} should be cold")
        self._ledger.drain()
        return answer

    def own(self, number: int) -> Answer:
        """The floor: vLLM has the document in its own prefix cache."""
        answer, record = self._ask(number)
        expect(answer.cached_tokens == DOCUMENT_TOKENS, f"vLLM found {answer.cached_tokens}")
        expect(record["loaded_tokens"] == 0, "the floor was loaded from KVStrata")
        return answer

    def loaded(self, number: int) -> Answer:
        """From KVStrata's host memory."""
        self.engine.reset_prefix_cache()
        answer, record = self._ask(number)
        expect(
            answer.cached_tokens == record["host_tokens"] == DOCUMENT_TOKENS,
            f"vLLM counts {answer.cached_tokens} cached tokens, KVStrata {record}",
        )
        return answer

    def _ask(self, number: int) -> tuple[Answer, dict[str, Any]]:
        answer = self.engine.ask(self.prompts[number])
        (record,) = self._ledger.next()
        wanted = self._answers.setdefault(number, answer.tokens)
        expect(answer.tokens == wanted, f"document {number}: {answer.tokens}, not {wanted}")
        return answer, record


def gemma(options: Options) -> list[Row]:
    """Warm over the floor and over cold, and the bytes that it takes."""
    prompts = Prompts(options.seed, model=gemma3())
    count, rounds = (3, 2) if options.quick else (NUM_DOCUMENTS, ROUNDS)
    times = Times()
    with Workplace(prompts.model, {"host.capacity": "2GiB", "planner": "off"}) as place:
        engine = place.engine(
            {"max_num_batched_tokens": DOCUMENT_TOKENS, "max_model_len": PROMPT_TOKENS + 200}
        )
        engine.wait()
        ledger = Ledger(place.client())
        warm_up = Asker(engine, ledger, prompts.make(1, collection=1))
        warm_up.cold(0)
        warm_up.loaded(0)
        warm_up.own(0)
        asker = Asker(engine, ledger, prompts.make(count))
        before = _used(ledger)
        for number in range(count):
            times.cold.append(asker.cold(number).first_s)
        stored = (_used(ledger) - before) / (count * DOCUMENT_TOKENS)
        for _ in range(rounds):
            for number in range(count):
                first = asker.loaded(number).first_s
                floor = asker.own(number).first_s
                second = asker.loaded(number).first_s
                times.floor.append(floor)
                for warm in (first, second):
                    times.warm.append(warm)
                    times.over_floor.append(warm / floor)
                    times.over_cold.append(warm / times.cold[number])
    say("Gemma 3 270M:")
    for what, seconds in (
        ("cold", times.cold), ("vLLM's own hit", times.floor), ("from KVStrata", times.warm)
    ):  # fmt: skip
        say("  " + milliseconds(what, seconds))
    over_floor, over_cold = spread(times.over_floor), spread(times.over_cold)
    return [
        Row(
            NAME,
            "Gemma 3 270M, warm from host memory / vLLM's own prefix hit",
            over_floor.median,
            1.12,
            detail=str(over_floor),
        ),
        Row(
            NAME,
            "Gemma 3 270M, warm from host memory / cold",
            over_cold.median,
            0.15,
            detail=str(over_cold),
        ),
        Row(
            NAME,
            "Gemma 3 270M, bytes stored per token / every layer's every chunk",
            stored / GEMMA_BYTES_PER_TOKEN,
            None,
            detail=f"{stored:.0f} of {GEMMA_BYTES_PER_TOKEN} bytes a token, headers and rounding "
            "to pages of memory included",
        ),
    ]


def recurrent(options: Options) -> list[Row]:
    """How many tokens are computed again because no state was kept where a prompt parts."""
    prompts = Prompts(options.seed, model=TINY["tiny_qwen3_next"]())
    whole, *others = prompts.make(2 if options.quick else 3, collection=2, tokens=PROMPT_TOKENS)
    whole, others = whole[:PROMPT_TOKENS], [other[:PROMPT_TOKENS] for other in others]
    chance = random.Random(options.seed)
    step = PROMPT_TOKENS // (6 if options.quick else 24)
    again: list[int] = []
    with Workplace(prompts.model, {"host.capacity": "1GiB", "planner": "off"}) as place:
        engine = place.engine({"max_num_batched_tokens": STRIDE, "max_model_len": 4096})
        about = engine.wait()
        expect(about["block_tokens"] == CHUNK_TOKENS, f"blocks of {about['block_tokens']} tokens")
        ledger = Ledger(place.client())
        engine.ask(whole)
        ledger.next()
        ledger.drain()
        for shared in range(STRIDE, PROMPT_TOKENS, step):
            engine.reset_prefix_cache()
            other = chance.choice(others)
            answer = engine.ask([*whole[:shared], *other[shared:]])
            (record,) = ledger.next()
            expect(answer.cached_tokens == record["loaded_tokens"], f"{answer}, {record}")
            expect(answer.cached_tokens <= shared, "more was reused than is shared")
            again.append(shared - answer.cached_tokens)
            ledger.drain()
        engine.reset_prefix_cache()
        same = engine.ask(whole)
        ledger.next()
    rest = PROMPT_TOKENS - same.cached_tokens
    named = f"max_num_batched_tokens = {STRIDE}, blocks of {CHUNK_TOKENS}"
    return [
        Row(
            NAME,
            f"gated delta nets, tokens computed again after the last state, of {PROMPT_TOKENS:,}",
            max(again),
            STRIDE,
            unit="tokens",
            detail=f"{named}; median {spread(again).median:.0f}, n = {len(again)}",
        ),
        Row(
            NAME,
            "the same prompt again, tokens computed",
            rest,
            CHUNK_TOKENS,
            unit="tokens",
            detail=named,
        ),
    ]


def _used(ledger: Ledger) -> int:
    """Bytes of host memory that are in use."""
    used: int = ledger.client.status()["host"]["allocated_bytes"]
    return used


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    return gemma(options) + recurrent(options)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
