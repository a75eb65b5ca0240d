"""A simulated fleet: each node has a cache of blocks and computes one prompt after the other."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from benchmarks.routing.trace import BLOCK_TOKENS, Request

from kvstrata.policies import create_policy
from kvstrata.routing import Loads, Policy, Prompt, Running

WINDOW_S = 60.0


@dataclass(frozen=True)
class Machine:
    """What a node can do.

    Args:
        capacity_tokens: of its cache, least recently used goes first.
        prefill: tokens a second that it computes.
        load: tokens a second that it loads of a hit.
        step_s: from a token of an answer to the next.
        decode_s: of its time that a token of an answer takes from prefill: steps are shared.
    """

    capacity_tokens: int
    prefill: float = 8_000.0
    load: float = 240_000.0
    step_s: float = 0.025
    decode_s: float = 0.0015


class Node:
    """One of them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._cache = create_policy("lru", machine.capacity_tokens)
        self._free_at = 0.0

    def leading(self, keys: Sequence[bytes]) -> int:
        """Blocks from the beginning on that it has."""
        return next((i for i, key in enumerate(keys) if key not in self._cache), len(keys))

    def serve(self, request: Request, keys: Sequence[bytes]) -> Served:
        """Put a request at the end of its queue."""
        machine = self._machine
        hit = min(self.leading(keys) * BLOCK_TOKENS, request.input_tokens)
        prefill_s = (request.input_tokens - hit) / machine.prefill + hit / machine.load
        work_s = prefill_s + request.output_tokens * machine.decode_s
        begun = max(request.at_s, self._free_at)
        self._free_at = begun + work_s
        self._keep(keys)
        first = begun + prefill_s
        return Served(hit, work_s, first, first + request.output_tokens * machine.step_s)

    def _keep(self, keys: Sequence[bytes]) -> None:
        """As the node's tiers do: room first, then tail before head, present or not."""
        cache = self._cache
        for key in reversed(keys):
            if key in cache:
                cache.touch(key)
                continue
            while cache.total_bytes + BLOCK_TOKENS > cache.capacity_bytes:
                cache.evict(lambda _: True)
            cache.insert(key, BLOCK_TOKENS, 1.0)


@dataclass(frozen=True)
class Served:
    """What became of a request: hit tokens, seconds of work, when its answer began and ended."""

    hit_tokens: int
    work_s: float
    first_at: float
    end_at: float


@dataclass
class Outcome:
    """What became of all of them."""

    hit_tokens: int = 0
    input_tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    work_s: dict[tuple[int, int], float] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    num_nodes: int = 0
    length_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """By token."""
        return self.hit_tokens / self.input_tokens

    @property
    def busy(self) -> float:
        """Share of all nodes' time that is work."""
        return sum(self.work_s.values()) / self.num_nodes / self.length_s

    def imbalance(self) -> list[float]:
        """Of each whole window: work sent to the node that got most, over the mean of all."""
        found = []
        for window in range(int(self.length_s // WINDOW_S)):
            work = [self.work_s.get((window, node), 0.0) for node in range(self.num_nodes)]
            found.append(max(work) / float(np.mean(work)))
        return found


def simulate(
    requests: Sequence[Request],
    names: Sequence[str],
    machine: Machine,
    make: Callable[[], Policy],
    knows: bool = False,
    faster: float = 1.0,
) -> Outcome:
    """Send every request where the policy says.

    Args:
        requests: in order of time.
        names: of the nodes.
        machine: what each of them is.
        make: a new policy.
        knows: whether it is told what each node has of each prompt.
        faster: by how much sooner than in the trace they come.
    """
    policy, loads = make(), Loads()
    nodes = {name: Node(machine) for name in names}
    outcome = Outcome(num_nodes=len(nodes), length_s=requests[-1].at_s / faster)
    events: list[tuple[float, int, Callable[[Running], None], Running]] = []
    for number, request in enumerate(requests):
        request = request._replace(at_s=request.at_s / faster)
        while events and events[0][0] <= request.at_s:
            _, _, happens, running = heapq.heappop(events)
            happens(running)
        keys = [block.to_bytes(8, "little") for block in request.blocks]
        whole = tuple(keys[: request.input_tokens // BLOCK_TOKENS])
        prompt = Prompt(whole, BLOCK_TOKENS, request.input_tokens)
        hits = None
        if knows:
            hits = {name: nodes[name].leading(whole) * BLOCK_TOKENS for name in names}
        choice = policy.route(prompt, names, loads.all(), hits)
        policy.sent(prompt, choice)
        running = loads.begin(choice.node, request.input_tokens - choice.hit_tokens)
        served = nodes[choice.node].serve(request, keys)
        heapq.heappush(events, (served.first_at, 2 * number, loads.answers, running))
        heapq.heappush(events, (served.end_at, 2 * number + 1, loads.end, running))
        outcome.hit_tokens += served.hit_tokens
        outcome.input_tokens += request.input_tokens
        outcome.first_s.append(served.first_at - request.at_s)
        window = (int(request.at_s // WINDOW_S), list(names).index(choice.node))
        outcome.work_s[window] = outcome.work_s.get(window, 0.0) + served.work_s
        reason = choice.reason.value
        outcome.reasons[reason] = outcome.reasons.get(reason, 0) + 1
    return outcome
