"""The advice itself: two candidates by two hashes, the better one, or away from a hot spot.

Source: DualMap, arXiv:2602.06502. Here candidates come from rendezvous hashing, not from two rings,
which moves as little when a node comes or goes; a third candidate is whoever holds the most, so
that a prompt that was moved away stays where it went; and nothing is taken back from a queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blake3 import blake3

from kvstrata.routing.base import Choice, Prompt, Reason, check

AFFINITY = 10.0
"""Tokens of load that a token of a hit is worth. One is saved now, the others by the turns that
follow, and because a second copy of the prefix would push something else out. What is common to
many prompts is soon everywhere, so a token of that counts as one."""


def candidates(key: bytes, nodes: Sequence[str]) -> tuple[str, ...]:
    """The two nodes that prompts with this key go to, the same for everybody who asks.

    Args:
        key: of a prefix.
        nodes: any order. Where there is one node only, so is the answer.
    """
    first = max(nodes, key=lambda node: (_rank(b"1", key, node), node))
    others = [node for node in nodes if node != first]
    if not others:
        return (first,)
    return first, max(others, key=lambda node: (_rank(b"2", key, node), node))


def route(
    prompt: Prompt,
    nodes: Sequence[str],
    loads: Mapping[str, float],
    hits: Mapping[str, int] | None = None,
    depth: int = 1,
    margin: float = float("inf"),
) -> Choice:
    """The node to ask for a prompt, and why. The same arguments give the same answer.

    Args:
        prompt: what is to be computed.
        nodes: names of those that can be asked, each once, any order.
        loads: work before each node, in tokens to compute; none for a node is 0.
        hits: leading tokens of the prompt that each node has; none for a node is 0.
        depth: how many leading chunks decide the candidates: as many as it takes to tell prompts
            apart that need not go to the same place. All but the last of them are common. Where the
            prompt has fewer, every node is a candidate.
        margin: how much better another node must be than the best candidate, in tokens, before the
            prompt goes there.
    Raises:
        UsageError: there are no nodes, or one is named twice.
    """
    check(nodes)
    held = {node: min((hits or {}).get(node, 0), prompt.num_tokens) for node in nodes}
    if depth <= len(prompt.keys):
        pair = candidates(prompt.keys[depth - 1], nodes)
    else:
        pair = tuple(sorted(nodes))
    if len(nodes) == 1:
        return Choice(nodes[0], Reason.ONLY, held[nodes[0]], pair)

    common = (depth - 1) * prompt.chunk_tokens

    def cost(node: str) -> tuple[float, int, str]:
        own = max(held[node] - common, 0)
        worth = held[node] - own + AFFINITY * own
        # Of equals a candidate comes first, and the first of them.
        place = pair.index(node) if node in pair else len(pair)
        return loads.get(node, 0.0) - worth, place, node

    holder = min(nodes, key=lambda node: (-held[node], cost(node)))
    if holder not in pair and held[holder] > max(held[node] for node in pair):
        pair = (*pair, holder)
    best = min(pair, key=cost)
    elsewhere = min(nodes, key=cost)
    if cost(elsewhere)[0] < cost(best)[0] - margin:
        return Choice(elsewhere, Reason.MOVED, held[elsewhere], pair)
    more = all(held[best] > held[node] for node in pair if node != best)
    return Choice(best, Reason.HIT if more else Reason.LOAD, held[best], pair)


def _rank(which: bytes, key: bytes, node: str) -> bytes:
    return blake3(which + key + node.encode()).digest(8)
