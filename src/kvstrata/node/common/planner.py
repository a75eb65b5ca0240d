"""Load or compute: how many of the chunks that were found are worth bringing.

A prompt's leading chunks can be loaded or computed, and loading may be the slower one: a link is
slow, far away, or has much to carry already. For every number of chunks that could be loaded the
time is estimated until all of them are there and the rest is computed, and the least wins. What is
in host memory costs nothing; tiers bring theirs side by side.

An engine that can compute chunks from the front while others arrive from the end waits for neither:
the two meet where they meet, and `meeting` says where that is likely.

Always loading was seen to lose a fifth against choosing, and in bad moments far more
(llm-d-router, issue 2833).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Prefill(NamedTuple):
    """How fast an engine computes a prompt, as it measured itself; all zero: unknown.

    Args:
        chunk_s: seconds a chunk takes.
        pair_s: seconds that it takes besides for each chunk before it, which it attends to.
    """

    chunk_s: float = 0.0
    pair_s: float = 0.0

    @property
    def known(self) -> bool:
        """Whether there is anything to reckon with."""
        return self.chunk_s > 0 or self.pair_s > 0

    def seconds(self, start: int, stop: int) -> float:
        """What the chunks of a prompt from number ``start`` up to ``stop`` take."""
        pairs = (stop * stop - start * start) / 2
        return self.chunk_s * (stop - start) + self.pair_s * pairs


class Link(NamedTuple):
    """A tier as a way to host memory.

    Args:
        bytes_per_s: what it brings; None: unknown, so it is not held against it.
        latency_s: what the shortest read takes.
        queued_bytes: what it has to bring before.
    """

    bytes_per_s: float | None
    latency_s: float = 0.0
    queued_bytes: int = 0

    def seconds(self, nbytes: int) -> float:
        """When it will have brought so much more."""
        if not nbytes or self.bytes_per_s is None:
            return 0.0
        if self.bytes_per_s <= 0:
            return math.inf
        return max(self.latency_s, (self.queued_bytes + nbytes) / self.bytes_per_s)


class Plan(NamedTuple):
    """What to do with the chunks that were found.

    Args:
        keep: how many of them to load, from the head on.
        load_s: what loading those takes.
        rest_s: what computing the others takes.
    """

    keep: int
    load_s: float
    rest_s: float


def plan(
    tiers: Sequence[int],
    nbytes: Sequence[int],
    links: Sequence[Link],
    prefill: Prefill,
    first: int = 0,
) -> Plan:
    """The best number of chunks to load.

    Args:
        tiers: for each chunk the number of the tier that it comes from; 0: host memory.
        nbytes: for each chunk the bytes to bring.
        links: of the tiers, from number 1 on.
        prefill: of the engine; where it is unknown everything is loaded.
        first: number of the first of these chunks in its prompt.
    """
    stop, coming = first + len(tiers), [0] * (len(links) + 1)
    here = next((i for i, tier in enumerate(tiers) if tier), len(tiers))
    best = Plan(here, 0.0, prefill.seconds(first + here, stop))
    least, load_s = best.rest_s, 0.0
    for number in range(here, len(tiers)):
        tier = tiers[number]
        if tier:
            coming[tier] += nbytes[number]
            load_s = max(load_s, links[tier - 1].seconds(coming[tier]))
        rest_s = prefill.seconds(first + number + 1, stop)
        if not prefill.known or load_s + rest_s <= least:
            least = load_s + rest_s
            best = Plan(number + 1, load_s, rest_s)
    return best


#: of what the better of loading and computing takes, what a meeting may take to be worth it: part
#: of a step is lost where the two meet
MEETING_GAIN = 0.9


class Meeting(NamedTuple):
    """Computing from the front while loading from the end.

    Args:
        at: the chunk where they meet, counted from the first one given.
        seconds: until they do.
    """

    at: int
    seconds: float


def meeting(
    tiers: Sequence[int],
    nbytes: Sequence[int],
    links: Sequence[Link],
    prefill: Prefill,
    first: int = 0,
) -> Meeting | None:
    """Where computing and loading would meet soonest; the arguments are those of `plan`.

    Leading chunks in host memory are not computed. None where one side does it all, or where
    nothing is known of the engine or of a link.
    """
    if not prefill.known or any(
        tier and links[tier - 1].bytes_per_s is None for tier in set(tiers)
    ):
        return None
    here = next((i for i, tier in enumerate(tiers) if tier), len(tiers))
    coming, load_s = [0] * (len(links) + 1), 0.0
    best: Meeting | None = None
    for place in range(len(tiers) - 1, here, -1):
        if tier := tiers[place]:
            coming[tier] += nbytes[place]
            load_s = max(load_s, links[tier - 1].seconds(coming[tier]))
        seconds = max(load_s, prefill.seconds(first + here, first + place))
        if best is None or seconds < best.seconds:
            best = Meeting(place, seconds)
    return best
