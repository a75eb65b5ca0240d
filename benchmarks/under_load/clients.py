"""Clients of a serving engine: turns of requests, proof of where their tokens came from, and the
ratios of times that are made of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import (
    CHUNK_TOKENS,
    DOCUMENT_TOKENS,
    Ledger,
    Wrong,
    expect,
    milliseconds,
    say,
)
from benchmarks.under_load.serving import Serving, Turn

NAME = "under_load"
IN_FLIGHT = (2, 4, 8)
MAX_TOKENS = 8
STORE_PASSES = 4
# Of answers, if nothing tells how many it is in plain vLLM.
LEAST_SAME = 0.7
MOST_DOCUMENTS = 16
# A prompt takes 24 blocks of 128 tokens. All documents stay in vLLM's own cache until it is reset.
ENGINE = {"num_gpu_blocks_override": 30 * MOST_DOCUMENTS}


class Clients:
    """Asks a serving engine, and proves of every turn what its answers were made of."""

    def __init__(self, engine: Serving, ledger: Ledger | None, prompts: Sequence[Any]) -> None:
        self.engine = engine
        self.ledger = ledger
        self.prompts = prompts
        self.how: Counter[str] = Counter()
        self._alone: list[list[int]] = []
        self._asked: Counter[str] = Counter()
        self._same: Counter[str] = Counter()

    def store(self) -> None:
        """Have every document computed, and stored if there is a node."""
        turn = self.engine.serve(self.prompts, 1)
        expect({r.cached_tokens for r in turn.replies} == {0}, "a document should be cold")
        if not self.ledger:
            return
        self.ledger.next(len(self.prompts))
        for _ in range(STORE_PASSES):
            self.ledger.drain()
            self.engine.reset_prefix_cache()
            turn = self.engine.serve(self.prompts, 1)
            self.ledger.next(len(self.prompts))
            if {reply.cached_tokens for reply in turn.replies} == {DOCUMENT_TOKENS}:
                return
        # An engine that is kept waiting drops a store; what was missing has been computed again.
        raise Wrong(f"not all documents are stored after {STORE_PASSES} passes")

    def compare_alone(self) -> None:
        """One at a time all work is split alike: loaded and own answers must be equal."""
        order = range(len(self.prompts))
        warm = [reply.tokens for reply in self.warm(order, 1).replies]
        self._alone = [reply.tokens for reply in self.own(order, 1).replies]
        expect(warm == self._alone, f"the answers differ: {warm} and {self._alone}")

    def own(self, order: Sequence[int], in_flight: int, **more: Any) -> Turn:
        """Every document from vLLM's own prefix cache."""
        return self._turn("own", order, in_flight, **more)

    def warm(self, order: Sequence[int], in_flight: int, **more: Any) -> Turn:
        """Every document from KVStrata's host memory: vLLM has forgotten them."""
        self.engine.reset_prefix_cache()
        return self._turn("warm", order, in_flight, **more)

    def agreement(self) -> str:
        """How many answers were the same as alone; batches round differently, in plain vLLM too.

        Raises:
            Wrong: clearly fewer where the KV was loaded.
        """
        share = {who: self._same[who] / self._asked[who] for who in self._asked}
        words = "answers as alone: " + ", ".join(f"{who} {part:.0%}" for who, part in share.items())
        expect(share.get("warm", 1.0) > share.get("own", LEAST_SAME) - 0.2, words)
        return words

    def _turn(
        self,
        who: str,
        order: Sequence[int],
        in_flight: int,
        max_tokens: int = MAX_TOKENS,
        running: Sequence[Any] = (),
    ) -> Turn:
        loaded = DOCUMENT_TOKENS if who == "warm" else 0
        turn = self.engine.serve([self.prompts[i] for i in order], in_flight, max_tokens, running)
        cached = Counter(reply.cached_tokens for reply in turn.replies)
        expect(set(cached) == {DOCUMENT_TOKENS}, f"cached tokens {cached}, not {DOCUMENT_TOKENS}")
        if self.ledger:
            records = self.ledger.next(len(order) + len(running))
            # What runs all the while has a prompt of less than a chunk.
            asked = [record for record in records if record["prompt_tokens"] > CHUNK_TOKENS]
            found = Counter((record["loaded_tokens"], record["host_tokens"]) for record in asked)
            expect(found == {(loaded, loaded): len(order)}, f"loaded, from host memory: {found}")
            self.how.update(record["load"] for record in asked if record["load"])
        if self._alone:
            self._asked[who] += len(order)
            self._same[who] += sum(
                reply.tokens == self._alone[i][: len(reply.tokens)]
                for i, reply in zip(order, turn.replies, strict=True)
            )
        return turn


@dataclass
class Times:
    """Turns by who answered, and the rounds they were in."""

    by: dict[str, list[Turn]] = field(default_factory=dict)

    def add(self, who: str, turn: Turn) -> None:
        """Enter one turn."""
        self.by.setdefault(who, []).append(turn)

    def firsts(self, who: str) -> list[float]:
        """All times to first token."""
        return [first for turn in self.by[who] for first in turn.firsts]

    def tell(self, what: str) -> None:
        """Print the percentiles."""
        say(f"{what}:")
        for who in self.by:
            say("  " + milliseconds(who, self.firsts(who)))


def pairs(ours: Turn, theirs: Turn) -> list[float]:
    """Times to first token, document by document."""
    return [a / b for a, b in zip(ours.firsts, theirs.firsts, strict=True)]
