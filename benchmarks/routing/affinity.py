"""Policies that follow caches alone: baselines of the benchmark, not for use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstrata.routing import Choice, Policy, Prompt, Reason, candidates
from kvstrata.routing.memory import Popularity


class PureAffinity(Policy):
    """By a hash of the first chunk that is not common, whatever the load."""

    def __init__(self) -> None:
        self._popularity = Popularity()

    def route(
        self,
        prompt: Prompt,
        nodes: Sequence[str],
        loads: Mapping[str, float],
        hits: Mapping[str, int] | None = None,
    ) -> Choice:
        depth = min(self._popularity.depth(prompt.keys), len(prompt.keys))
        key = prompt.keys[depth - 1] if prompt.keys else b""
        return Choice(candidates(key, nodes)[0], Reason.HIT)

    def sent(self, prompt: Prompt, choice: Choice) -> None:
        self._popularity.add(prompt.keys)


MATCH = 0.1


class LongestPrefix(Policy):
    """Whoever has most of the prompt, by a look into every node; the least busy one if that is less
    than a tenth. What routers that know of prefixes do when they do not watch the load."""

    def route(
        self,
        prompt: Prompt,
        nodes: Sequence[str],
        loads: Mapping[str, float],
        hits: Mapping[str, int] | None = None,
    ) -> Choice:
        held = hits or {}
        few = all(held.get(node, 0) < MATCH * prompt.num_tokens for node in nodes)
        best = min(nodes, key=lambda n: (0 if few else -held.get(n, 0), loads.get(n, 0.0), n))
        return Choice(best, Reason.HIT, held.get(best, 0))

    def sent(self, prompt: Prompt, choice: Choice) -> None:
        pass
