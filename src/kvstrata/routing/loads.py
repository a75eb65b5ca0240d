"""How busy nodes are, by what a router itself has running there and what they say of themselves."""

from __future__ import annotations

from collections.abc import Mapping

DECODING_TOKENS = 2000.0
"""What a request that is being answered counts, in tokens to compute: its steps slow a prefill, and
nobody knows how many are left."""
USUAL_TOKENS = 2000.0
"""What a request of somebody else's counts: of those a node tells only how many there are."""


class Running:
    """A request that was sent to a node, from `Loads.begin` on."""

    def __init__(self, node: str, tokens: float) -> None:
        self.node = node
        self.tokens = tokens
        """Still to be computed, and 0 once its answer has begun."""


class Loads:
    """Work before each node, in tokens to compute."""

    def __init__(self) -> None:
        self._running: dict[str, set[Running]] = {}
        self._waiting: dict[str, float] = {}
        self._others: dict[str, int] = {}

    def begin(self, node: str, tokens: float) -> Running:
        """A request was sent there, of which so many tokens have to be computed."""
        running = Running(node, tokens)
        self._running.setdefault(node, set()).add(running)
        self._waiting[node] = self._waiting.get(node, 0.0) + tokens
        return running

    def answers(self, running: Running) -> None:
        """Its answer has begun. Repeatable."""
        self._waiting[running.node] -= running.tokens
        running.tokens = 0.0

    def end(self, running: Running) -> None:
        """It has ended, however. Repeatable."""
        if running in self._running[running.node]:
            self.answers(running)
            self._running[running.node].remove(running)

    def num_running(self, node: str) -> int:
        """Requests that were sent there and have not ended."""
        return len(self._running.get(node, ()))

    def tell(self, node: str, num_requests: int | None) -> None:
        """How many requests a node says that it has, those sent here included; None: unknown."""
        self._others[node] = max((num_requests or 0) - self.num_running(node), 0)

    def of(self, node: str) -> float:
        """Work before one node."""
        return (
            self._waiting.get(node, 0.0)
            + DECODING_TOKENS * self.num_running(node)
            + USUAL_TOKENS * self._others.get(node, 0)
        )

    def all(self) -> Mapping[str, float]:
        """Work before every node that was ever sent something or told of itself."""
        return {node: self.of(node) for node in {*self._running, *self._others}}
