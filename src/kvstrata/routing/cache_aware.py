"""The policy with a memory: what it sent where lately decides, or what is known of the fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstrata.routing.base import Choice, Policy, Prompt
from kvstrata.routing.dual import route
from kvstrata.routing.memory import Popularity, Sent

CACHE_TOKENS = 4_000_000
"""Of a node whose size nobody told: rather too many, since a hit that is not expected is lost. In
chunks of 256 tokens they take about 3 MB to remember."""
DECAY = 0.5 ** (1 / 60)
"""After each prompt what was sent before counts so much: half, after 60."""
LATELY = 0.6
"""Tokens of load that a token of work counts that was sent lately. It spreads work where no node
has a queue."""
ANSWER_TOKENS = 2000.0
"""Work of an answer, in tokens to compute; nobody knows how long it will be."""
MARGIN = 0.2
"""Better by this part of the work of a usual prompt, and another node is worth moving to."""


class CacheAware(Policy):
    """Sends prompts where their prefixes are, and away from hot spots; see `kvstrata.routing.dual`.

    The constants were found on the trace of ``benchmarks/routing``, which says how it does.

    Args:
        cache_tokens: what one node holds in all its tiers; about.
    """

    def __init__(self, cache_tokens: int = CACHE_TOKENS) -> None:
        self._sent = Sent(cache_tokens)
        self._popularity = Popularity()
        self._lately: dict[str, float] = {}

    def route(
        self,
        prompt: Prompt,
        nodes: Sequence[str],
        loads: Mapping[str, float],
        hits: Mapping[str, int] | None = None,
    ) -> Choice:
        held = {**self._sent.leading(prompt, nodes), **(hits or {})}
        lately = {node: self._lately.get(node, 0.0) for node in nodes}
        least = min(lately.values(), default=0.0)
        work = {
            node: loads.get(node, 0.0) + LATELY * (sent - least) for node, sent in lately.items()
        }
        usual = sum(self._lately.values()) * (1 - DECAY)
        depth = self._popularity.depth(prompt.keys)
        return route(prompt, nodes, work, held, depth, MARGIN * usual)

    def sent(self, prompt: Prompt, choice: Choice) -> None:
        self._sent.add(prompt, choice.node)
        self._popularity.add(prompt.keys)
        faded = {node: work * DECAY for node, work in self._lately.items()}
        # Of a node that is asked no more the last token fades, and it is forgotten.
        self._lately = {node: work for node, work in faded.items() if work >= 1.0}
        work = prompt.num_tokens - choice.hit_tokens + ANSWER_TOKENS
        self._lately[choice.node] = self._lately.get(choice.node, 0.0) + work
