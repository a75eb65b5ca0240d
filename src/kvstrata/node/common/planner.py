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

import numpy as np
import numpy.typing as npt


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
    num, stop = len(tiers), first + len(tiers)
    here = _num_here(tiers)
    load_s = _loading(tiers[here:], nbytes[here:], links)
    if not prefill.known:
        return Plan(num, float(load_s[-1]), 0.0)
    kept = np.arange(here, num + 1)
    rest_s = prefill.chunk_s * (num - kept)
    rest_s += prefill.pair_s * (stop * stop - (first + kept) ** 2) / 2
    taken = load_s + rest_s
    best = len(taken) - 1 - int(np.argmin(taken[::-1]))  # of equal ones the most
    return Plan(here + best, float(load_s[best]), float(rest_s[best]))


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
    here = _num_here(tiers)
    places = np.arange(len(tiers) - 1, here, -1)
    if not len(places):
        return None
    load_s = _loading(tiers[:here:-1], nbytes[:here:-1], links)[1:]
    prefill_s = prefill.chunk_s * (places - here)
    prefill_s += prefill.pair_s * ((first + places) ** 2 - (first + here) ** 2) / 2
    seconds = np.maximum(load_s, prefill_s)
    best = int(np.argmin(seconds))  # of equal ones the last place
    return Meeting(int(places[best]), float(seconds[best]))


def _num_here(tiers: Sequence[int]) -> int:
    """How many leading chunks are in host memory."""
    return next((i for i, tier in enumerate(tiers) if tier), len(tiers))


def _loading(
    tiers: Sequence[int], nbytes: Sequence[int], links: Sequence[Link]
) -> npt.NDArray[np.float64]:
    """What loading the first 0, 1, 2, ... of these chunks takes, float64 seconds."""
    num = len(tiers)
    load_s = np.zeros(num + 1)
    tier_of, nbytes_of = np.fromiter(tiers, np.int64, num), np.fromiter(nbytes, np.int64, num)
    for tier, link in enumerate(links, 1):
        mine = tier_of == tier
        if not mine.any() or link.bytes_per_s is None:
            continue
        coming = np.cumsum(np.where(mine, nbytes_of, 0))
        if link.bytes_per_s > 0:
            each_s = (link.queued_bytes + coming) / link.bytes_per_s
        else:
            each_s = np.full(num, math.inf)
        each_s = np.where(coming > 0, np.maximum(link.latency_s, each_s), 0.0)
        load_s[1:] = np.maximum(load_s[1:], each_s)
    return load_s
