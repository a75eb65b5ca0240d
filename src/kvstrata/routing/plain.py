"""Policies that know nothing of what nodes hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstrata.routing.base import Choice, Policy, Prompt, Reason, check


class RoundRobin(Policy):
    """One after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def route(
        self,
        prompt: Prompt,
        nodes: Sequence[str],
        loads: Mapping[str, float],
        hits: Mapping[str, int] | None = None,
    ) -> Choice:
        check(nodes)
        self._turn += 1
        reason = Reason.TURN if len(nodes) > 1 else Reason.ONLY
        return Choice(nodes[(self._turn - 1) % len(nodes)], reason)

    def sent(self, prompt: Prompt, choice: Choice) -> None:
        pass


class LeastLoad(Policy):
    """The one with the least work before it; of equals the one that was asked longest ago."""

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}
        self._count = 0

    def route(
        self,
        prompt: Prompt,
        nodes: Sequence[str],
        loads: Mapping[str, float],
        hits: Mapping[str, int] | None = None,
    ) -> Choice:
        check(nodes)
        best = min(nodes, key=lambda node: (loads.get(node, 0.0), self._asked.get(node, 0)))
        return Choice(best, Reason.LOAD if len(nodes) > 1 else Reason.ONLY)

    def sent(self, prompt: Prompt, choice: Choice) -> None:
        self._count += 1
        self._asked[choice.node] = self._count
