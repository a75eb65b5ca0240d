"""Documents in another order: put together out of what is stored, beside computing all of it.

One engine and one node. Each order of the documents is asked for in every way in turn, and vLLM
itself has none of it.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

from kvstrata.testing.engine import Engine
from kvstrata.testing.models import documents
from kvstrata.testing.workplace import Workplace

NAME = "blend"
NUM_DOCUMENTS, TOKENS = 6, 500
NUM_ORDERS, QUICK_ORDERS = 8, 2
FULL = "computed as a whole"
RATIO = 0.15
WAYS: Mapping[str, Mapping[str, Any] | None] = {
    FULL: None,
    "15% by deviation": {"plan": "deviation", "ratio": RATIO},
    "15% at the edges": {"plan": "edges", "ratio": RATIO},
    "nothing computed anew": {"plan": "none"},
}
BOUNDS = {"15% by deviation": 2.5, "15% at the edges": 4.0, "nothing computed anew": None}
HEAD = "Here are some parts of the documentation of a programming language.\n\n"
QUESTION = "\n\nQuestion: which of them is about the most important thing?\n\nAnswer: The"
# All of a prompt in one step, as fast as it can be computed.
ENGINE = {"max_num_batched_tokens": 4096, "max_model_len": 8192}
EXACT: dict[str, Any] = {"kvstrata": {"store": False}}
PICTURE = Path("build/blend.png")


@dataclass
class Library:
    """The documents, and the prompts that they make."""

    head: list[int]
    documents: Sequence[Sequence[int]]
    question: list[int]

    def prompt(self, order: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """A prompt with the documents in this order, and where in it each of them is."""
        tokens, segments = list(self.head), []
        for number in order:
            segments.append([len(tokens), len(tokens) + len(self.documents[number])])
            tokens += self.documents[number]
        return tokens + self.question, segments


@dataclass
class Asked:
    """Times to first token of each way, order by order, and the tokens that were answered."""

    times: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    reused: list[int] = field(default_factory=list)


def library(prompts: Prompts) -> Library:
    """Documents of real text."""

    def words(text: str) -> list[int]:
        ids: list[int] = prompts.tokenizer.encode(text, add_special_tokens=False)
        return ids

    texts = documents(NUM_DOCUMENTS, TOKENS, prompts.tokenizer)
    return Library(words(HEAD), texts, words(QUESTION))


def compare(options: Options, prompts: Prompts) -> Asked:
    """Every order in every way, twice."""
    shelf, asked = library(prompts), Asked()
    settings = {"host.capacity": "1GiB", "blend": "on", "hints": "all", "planner": "off"}
    with Workplace(prompts.model, settings) as place:
        engine = place.engine(options=ENGINE)
        expect(engine.wait()["block_tokens"] == CHUNK_TOKENS, "blocks are no chunks")
        ledger = Ledger(place.client())
        # The engine shows that it can blend, and the ways are warmed up.
        prompt, segments = shelf.prompt(range(NUM_DOCUMENTS))
        # Only whole chunks are found from another place.
        prompt += shelf.question * (1 + CHUNK_TOKENS // len(shelf.question))
        stored = ledger.stored() + len(prompt) // CHUNK_TOKENS
        engine.ask(prompt, transfer={"kvstrata": {"blend": {"segments": segments}}})
        ledger.next()
        ledger.drain(stored)
        names = list(WAYS)
        orders = _orders(QUICK_ORDERS if options.quick else NUM_ORDERS, options.seed)
        for name in names:
            _ask(engine, ledger, shelf, orders[0], name)
        for number, order in enumerate(orders):
            for repeat in range(2):
                turn = (number + repeat) % len(names)
                for name in names[turn:] + names[:turn]:
                    first_s, tokens, record = _ask(engine, ledger, shelf, order, name)
                    asked.times.setdefault(name, []).append(first_s)
                    known = asked.answers.setdefault((name, number), tokens)
                    expect(known == tokens, f"{name}: {tokens}, and {known} before")
                    if name != FULL:
                        asked.reused.append(record["blended_tokens"])
    return asked


def _orders(count: int, seed: int) -> list[list[int]]:
    """So many orders in which no document is where it was stored."""
    chance, found = random.Random(seed), list[list[int]]()
    while len(found) < count:
        order = chance.sample(range(NUM_DOCUMENTS), NUM_DOCUMENTS)
        if all(place != number for place, number in enumerate(order)) and order not in found:
            found.append(order)
    return found


def _ask(
    engine: Engine, ledger: Ledger, shelf: Library, order: Sequence[int], name: str
) -> tuple[float, list[int], dict[str, Any]]:
    """One answer, of which vLLM itself has nothing."""
    prompt, segments = shelf.prompt(order)
    way, transfer = WAYS[name], EXACT
    if way is not None:
        transfer = {"kvstrata": {"store": False, "blend": {"segments": segments, **way}}}
    engine.reset_prefix_cache()
    answer = engine.ask(prompt, transfer=transfer)
    (record,) = ledger.next()
    if way is None:
        expect(answer.cached_tokens == 0, f"{name}: {answer.cached_tokens} tokens are cached")
    else:
        _check(record, name, way, len(shelf.head), len(prompt) - len(shelf.question))
    return answer.first_s, answer.tokens, record


def _check(
    record: Mapping[str, Any], name: str, way: Mapping[str, Any], first: int, last: int
) -> None:
    """Whether a prompt was put together as it should have been."""
    end = last // CHUNK_TOKENS * CHUNK_TOKENS
    reused, computed = record["blended_tokens"], record["recomputed_tokens"]
    expect(
        reused >= end - first - CHUNK_TOKENS, f"{name}: {reused} of {end - first} reused: {record}"
    )
    expect(end - first - reused + first <= computed, f"{name}: {computed} computed: {record}")
    chosen = computed - (end - reused)
    wanted = way.get("ratio", 0.0) * reused
    expect(abs(chosen - wanted) <= 1, f"{name}: {chosen} computed anew, not {wanted:.0f}")


def draw(asked: Asked) -> None:
    """Times to first token, way by way."""
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        return
    figure = figures.Figure(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(WAYS):
        times = [1e3 * each for each in asked.times[name]]
        median = 1e3 * spread(asked.times[name]).median
        axes.barh(place, median, color="tab:blue" if name == FULL else "tab:orange", alpha=0.5)
        axes.plot(times, [place] * len(times), "k.", markersize=4)
        axes.text(median, place + 0.42, f" {median:.0f} ms", va="top", fontsize=9)
    axes.set_yticks(range(len(WAYS)), list(WAYS))
    axes.invert_yaxis()
    axes.set_xlabel(f"time to first token, ms: {NUM_DOCUMENTS} documents of {TOKENS} tokens")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    say(f"the picture is {PICTURE}")


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    asked = compare(options, Prompts(options.seed))
    for name, times in asked.times.items():
        say("  " + milliseconds(name, times))
    draw(asked)
    rows = []
    full = asked.times[FULL]
    for name, bound in BOUNDS.items():
        times = asked.times[name]
        gain = spread(theirs / mine for theirs, mine in zip(full, times, strict=True))
        rows.append(
            Row(
                NAME,
                f"time to first token, {FULL} / {name}",
                gain.median,
                bound,
                at_most=False,
                detail=f"{gain}; {spread(full).median * 1e3:.0f} / "
                f"{spread(times).median * 1e3:.0f} ms; of {NUM_DOCUMENTS} x {TOKENS} tokens "
                f"{min(asked.reused)} to {max(asked.reused)} reused",
            )
        )
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
