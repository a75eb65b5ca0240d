"""What KVStrata costs where it cannot help: cold prompts, and vLLM's own prefix hits.

Two processes differ by chance, so there are three comparisons: engines with and without KVStrata
that take turns on every prompt; a second engine without it, which shows how far two equal processes
are apart; and one engine whose connector is taken out and put back between prompts.
"""

from __future__ import annotations

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
    geometric_mean,
    main,
    milliseconds,
    say,
    spread,
)

from kvstrata.testing.engine import Engine
from kvstrata.testing.workplace import Workplace

NAME = "cold_overhead"
BOUND = 1.03
STORED = DOCUMENT_TOKENS // CHUNK_TOKENS + 1  # chunks, and the end behind them
WITH, WITHOUT, CONTROL = "with KVStrata", "without", "without, second process"


@dataclass(frozen=True)
class Size:
    """How much is asked."""

    cold: int
    hit_documents: int
    hit_rounds: int
    in_row: int
    inside_cold: int
    inside_rounds: int


FULL = Size(cold=12, hit_documents=8, hit_rounds=12, in_row=20, inside_cold=10, inside_rounds=15)
QUICK = Size(cold=3, hit_documents=3, hit_rounds=3, in_row=4, inside_cold=2, inside_rounds=3)


@dataclass
class Times:
    """Seconds to the first token by who answered, in the order of the questions."""

    by: dict[str, list[float]] = field(default_factory=dict)

    def add(self, who: str, seconds: float) -> None:
        """Enter one answer; every question is put to everybody."""
        self.by.setdefault(who, []).append(seconds)

    def ratios(self, who: str, others: Sequence[str]) -> list[float]:
        """Question by question, over the geometric mean of the others."""
        rows = zip(self.by[who], *(self.by[other] for other in others), strict=True)
        return [mine / geometric_mean(theirs) for mine, *theirs in rows]

    def tell(self, what: str) -> None:
        """Print the percentiles."""
        say(f"{what}:")
        for who, seconds in self.by.items():
            say("  " + milliseconds(who, seconds))


class Trio:
    """The three engines and the rules of taking turns."""

    def __init__(self, place: Workplace) -> None:
        self.engines: dict[str, Engine] = {
            WITH: place.engine(),
            WITHOUT: place.engine(with_kvstrata=False),
            CONTROL: place.engine(with_kvstrata=False),
        }
        for engine in self.engines.values():
            threads = engine.wait()["threads"]
            expect(threads == self.engines[WITH].wait()["threads"], "threads are bound unequally")
        self.ledger = Ledger(place.client())
        self._turn = 0
        self._stored = 0

    def in_turn(self) -> list[tuple[str, Engine]]:
        """All three, somebody else first each time."""
        self._turn += 1
        names = list(self.engines)
        first = self._turn % len(names)
        return [(name, self.engines[name]) for name in names[first:] + names[:first]]

    def ask(self, prompt: Sequence[int], cached: int, times: Times | None) -> None:
        """Put one question to everybody, nothing else going on."""
        tokens: dict[str, list[int]] = {}
        for who, engine in self.in_turn():
            answer = engine.ask(prompt)
            tokens[who] = answer.tokens
            expect(answer.cached_tokens == cached, f"{who}: {answer.cached_tokens} tokens cached")
            if who == WITH:
                (record,) = self.ledger.next()
                expect(record["loaded_tokens"] == 0, "it was loaded from KVStrata")
                self._drain(0 if cached else STORED)
            if times is not None:
                times.add(who, answer.first_s)
        expect(len(set(map(tuple, tokens.values()))) == 1, f"the answers differ: {tokens}")

    def back_to_back(self, prompts: Sequence[Any], times: Times) -> None:
        """Prompts without a pause: what one of them stores is in the way of the next."""
        answers = {}
        self._turn += 1
        for who in (WITH, WITHOUT) if self._turn % 2 else (WITHOUT, WITH):
            seconds, answered = self.engines[who].ask_all(prompts, in_turn=True)
            times.add(who, seconds)
            answers[who] = [answer.tokens for answer in answered]
            if who == WITH:
                self.ledger.next(len(prompts))
                self._drain(STORED * len(prompts))
        expect(answers[WITH] == answers[WITHOUT], "the answers differ")

    def _drain(self, objects: int) -> None:
        self._stored += objects
        self.ledger.drain(self._stored)


def judged(what: str, times: Times, who: str, others: Sequence[str]) -> Row:
    """A row with the bound."""
    ratio = spread(times.ratios(who, others))
    return Row(NAME, what, ratio.median, BOUND, detail=str(ratio))


def control(what: str, times: Times) -> Row:
    """How far two engines without KVStrata are apart."""
    ratio = spread(times.ratios(CONTROL, [WITHOUT]))
    return Row(NAME, what, ratio.median, None, detail=str(ratio))


def between_processes(trio: Trio, prompts: Prompts, size: Size) -> list[Row]:
    """Three processes, asked in turn."""
    cold, hit, in_row = Times(), Times(), Times()
    documents = prompts.make(size.cold + 1)
    trio.ask(documents[0], 0, None)
    for prompt in documents[1:]:
        trio.ask(prompt, 0, cold)
    cold.tell("cold, three processes in turn")
    for _ in range(size.hit_rounds):
        for prompt in documents[-size.hit_documents :]:
            trio.ask(prompt, DOCUMENT_TOKENS, hit)
    hit.tell("vLLM's own prefix hit, three processes in turn")
    many = prompts.make(size.in_row, collection=1)
    for start in range(0, size.in_row, size.in_row // 4):
        trio.back_to_back(many[start : start + size.in_row // 4], in_row)
    totals = {who: sum(seconds) for who, seconds in in_row.by.items()}
    say("back to back: " + ", ".join(f"{who} {total:.1f} s" for who, total in totals.items()))
    both = [WITHOUT, CONTROL]
    blocks = in_row.ratios(WITH, [WITHOUT])
    return [
        judged("vLLM's own prefix hit, with KVStrata / without, in turn", hit, WITH, both),
        control("control: vLLM's own prefix hit, without / without, in turn", hit),
        judged("cold, with KVStrata / without, in turn", cold, WITH, both),
        control("control: cold, without / without, in turn", cold),
        Row(
            NAME,
            f"{size.in_row} cold prompts back to back, with KVStrata / without (total time)",
            totals[WITH] / totals[WITHOUT],
            BOUND,
            detail=f"by quarters {min(blocks):.3f} to {max(blocks):.3f}",
        ),
    ]


def inside_one_process(trio: Trio, prompts: Prompts, size: Size) -> list[Row]:
    """One process, its connector taken out and put back."""
    engine, ledger = trio.engines[WITH], trio.ledger
    cold, hit = Times(), Times()

    def ask(prompt: Sequence[int], who: str, cached: int, times: Times) -> list[int]:
        (engine.attach if who == WITH else engine.detach)()
        stored = ledger.stored()
        answer = engine.ask(prompt)
        expect(answer.cached_tokens == cached, f"{who}: {answer.cached_tokens} tokens cached")
        if who == WITH:
            ledger.next()
            ledger.drain(stored + (0 if cached else STORED))
        else:
            expect(ledger.stored() == stored, "the connector is not out")
        times.add(who, answer.first_s)
        return answer.tokens

    for number, prompt in enumerate(prompts.make(size.inside_cold, collection=2)):
        sides = (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH)
        tokens = []
        for who in sides:
            engine.reset_prefix_cache()
            tokens.append(ask(prompt, who, 0, cold))
        expect(tokens[0] == tokens[1], "the answers differ")
    cold.tell("cold, one process")
    documents = prompts.make(size.hit_documents, collection=3)
    engine.attach()
    for prompt in documents:
        ask(prompt, WITH, 0, Times())
    for number in range(size.inside_rounds):
        for prompt in documents:
            sides = (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH)
            tokens = [ask(prompt, who, DOCUMENT_TOKENS, hit) for who in sides]
            expect(tokens[0] == tokens[1], "the answers differ")
    hit.tell("vLLM's own prefix hit, one process")
    engine.attach()
    return [
        judged("vLLM's own prefix hit, connector in / out of one process", hit, WITH, [WITHOUT]),
        judged("cold, connector in / out of one process", cold, WITH, [WITHOUT]),
    ]


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    prompts = Prompts(options.seed)
    size = QUICK if options.quick else FULL
    with Workplace(prompts.model, {"host.capacity": "1GiB", "inside": "on"}) as place:
        trio = Trio(place)
        return between_processes(trio, prompts, size) + inside_one_process(trio, prompts, size)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
