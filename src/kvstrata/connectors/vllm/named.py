"""What a request names of its prompt, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstrata.blend import Rule
from kvstrata.blend.segments import Asked
from kvstrata.blend.signposts import Signposts
from kvstrata.connectors.vllm.finding import Search
from kvstrata.connectors.vllm.messages import Piece, Source
from kvstrata.connectors.vllm.stats import Tally


class Named:
    """What a request asks for, and what came of it.

    Args:
        asked: its hint.
        texts: the parts of its prompt that it names.
    """

    def __init__(self, asked: Asked, texts: Sequence[range]) -> None:
        self.asked, self.texts = asked, texts
        self.posts: Signposts | None = None
        self.keys: list[bytes] = []  # of the signposts, one for each text
        self.rule = Rule("none", 0.0)
        self.why = ""  # nothing was blended
        self.search: Search | None = None
        self.made: Made | None = None
        self.signed: set[int] = set()  # numbers of texts whose signposts are there
        self.num_stored = -1  # chunks of the request when signposts were written last
        self.num_recomputed = 0
        self.num_waits = 0

    def fail(self) -> None:
        """Its blend came to nothing: vLLM computes the prompt."""
        self.made, self.why, self.num_recomputed = None, "the load failed", 0

    def ended(self, tally: Tally) -> None:
        """Its request has ended."""
        if self.made is not None:
            tally.add("blended_tokens_total", self.made.num_reused, self.rule.plan)
            tally.add("recomputed_tokens_total", self.num_recomputed)

    def record(self) -> dict[str, Any]:
        """For the request's record."""
        made = self.made
        return {
            "blended_tokens": 0 if made is None else made.num_reused,
            "recomputed_tokens": self.num_recomputed,
            "blend_plan": str(self.rule) if made is not None else "",
            "blend_miss": "" if made is not None else self.why,
        }


@dataclass
class Made:
    """A prompt put together.

    Args:
        runs: behind the exact head, by position: of some rows each prompt's piece.
        sources: of these.
        weights: of each source, where several are mixed.
        tiers: of each chunk that a run's first piece is of, its tier.
        first: position of the first token that is not exact.
        end: of the load, in tokens.
        num_reused: tokens of the runs.
    """

    runs: list[list[Piece]]
    sources: list[Source]
    weights: list[float]
    tiers: bytes
    first: int
    end: int
    num_reused: int
