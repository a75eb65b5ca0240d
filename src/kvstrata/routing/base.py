"""What a policy is told, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from kvstrata.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """A prompt as a router sees it.

    Args:
        keys: one for each whole chunk from the beginning on; equal keys: equal prompts up to there,
            of one model and one salt.
        chunk_tokens: tokens of a chunk.
        num_tokens: of the whole prompt; about, if it was text.
    Raises:
        UsageError: a chunk of no tokens, or more chunks than tokens fill.
    """

    keys: tuple[bytes, ...]
    chunk_tokens: int
    num_tokens: int

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or len(self.keys) * self.chunk_tokens > self.num_tokens:
            raise UsageError(
                f"prompt: {len(self.keys)} chunks of {self.chunk_tokens} tokens do not fit in "
                f"{self.num_tokens} tokens"
            )


class Reason(str, Enum):
    """Why a node was chosen."""

    ONLY = "only"
    """There is no other."""
    HIT = "hit"
    """It has more of the prompt than the other candidates."""
    LOAD = "load"
    """It is the less busy candidate."""
    MOVED = "moved"
    """All candidates are so busy that it is better to compute the prompt elsewhere."""
    TURN = "turn"
    """It is its turn."""


@dataclass(frozen=True)
class Choice:
    """The node to ask, and why.

    Args:
        node: its name, as it was given.
        reason: why this one.
        hit_tokens: of the prompt, which it is believed to have.
        candidates: those that were considered first.
    """

    node: str
    reason: Reason
    hit_tokens: int = 0
    candidates: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = {
            Reason.ONLY: "there is no other",
            Reason.HIT: f"it has {self.hit_tokens} tokens of the prompt",
            Reason.LOAD: "it is the less busy candidate",
            Reason.MOVED: "its candidates are too busy",
            Reason.TURN: "it is its turn",
        }
        among = f", of {', '.join(self.candidates)}" if self.candidates else ""
        return f"{self.node}: {words[self.reason]}{among}"


class Policy(ABC):
    """Says where to send prompts. Not thread-safe; asks nobody, and never blocks."""

    @abstractmethod
    def route(
        self,
        prompt: Prompt,
        nodes: Sequence[str],
        loads: Mapping[str, float],
        hits: Mapping[str, int] | None = None,
    ) -> Choice:
        """The node to ask. Changes nothing that a later answer depends on, but whose turn it is.

        Args:
            prompt: what is to be computed.
            nodes: names of those that can be asked now.
            loads: work before each node, in tokens to compute; none for a node is 0.
            hits: tokens that nodes are known to have of the prompt, from a look into the fleet. Of
                nodes that are not named the policy's own memory counts.
        Raises:
            UsageError: there are no nodes.
        """

    @abstractmethod
    def sent(self, prompt: Prompt, choice: Choice) -> None:
        """The prompt was sent there."""


def check(nodes: Sequence[str]) -> None:
    """Raise `UsageError` unless there are nodes, each named once."""
    if not nodes:
        raise UsageError("routing: there is no node to choose from")
    if len(set(nodes)) != len(nodes):
        raise UsageError(f"routing: a node is named twice: {', '.join(nodes)}")
