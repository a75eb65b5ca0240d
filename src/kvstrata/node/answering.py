"""What a match answers in the end: what was leased, how long the rest takes, and why it is not."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvstrata.node.common.slices import Work
from kvstrata.node.operating.kin import Asked
from kvstrata.node.operating.reasons import Missing, Reasons
from kvstrata.node.searching import Search
from kvstrata.node.service.backing import Backing
from kvstrata.observe.counters import Counters
from kvstrata.observe.reasons import Reason, Why
from kvstrata.wire import protocol as p

DRAINING = "it is being drained"
SLICE = 1024
"""Rows whose offsets one slice collects."""


class Answers:
    """Words the answers of matches, and counts them.

    Args:
        backings: the slower tiers, fastest first.
        counters: the node's.
        reasons: of what is missing.
    """

    def __init__(self, backings: Sequence[Backing], counters: Counters, reasons: Reasons) -> None:
        self._names = ["host", *(backing.name for backing in backings)]
        self._counters = counters
        self._reasons = reasons

    def of(self, search: Search) -> Work[p.Matched]:
        """The answer of a match that has ended."""
        why = yield from self._why(search)
        offsets = yield from self._offsets(search)
        self._count(search)
        here = search.here
        if here < 0:
            coming = (i for i, nbytes in enumerate(search.coming) if nbytes)
            here = next(coming, len(search.coming))
        reckoned = (
            search.num_found,
            search.load_s,
            search.prefill.seconds(len(search.tiers), search.num_found),
            search.prefill.seconds(here, search.num_found),
            search.peer_refused,
            why,
            search.bounds.end if search.bounds is not None and search.bounds.full else 0,
            search.meet,
        )
        if search.lease is None or search.client.ended:
            return p.Matched(search.id, 0, b"", b"", *reckoned)
        search.lease.whole = True
        return p.Matched(search.id, search.lease.id, bytes(search.tiers), offsets, *reckoned)

    def _why(self, search: Search) -> Work[list[Reason]]:
        """Why the chunks behind those that were leased are not."""
        asked = None
        if search.keys and search.heads:
            asked = Asked(search.keys[0], search.namespace, search.owner, search.heads)
        reasons = []
        count = max(len(search.tiers), search.num_found)
        if (planned := count - len(search.tiers)) > 0:
            reasons.append(Reason(Why.PLANNED, planned))
        keys, bounds = search.keys[count:], search.bounds
        if bounds is not None and count < bounds.end and not search.cut:
            hole = bounds.hole if bounds.hole >= 0 else count
            reasons.append(
                self._reasons.of_boundary(search.keys[hole], bounds.end - count, search.late)
            )
            keys = search.keys[bounds.end :]
        if keys and not search.client.ended:
            missing = Missing(
                asked, keys, not count, search.parts, search.cut, bool(search.namespace),
                search.late, search.among,
            )  # fmt: skip
            reasons += yield from self._reasons.of(missing)
        if asked is not None:
            self._reasons.kin.note(asked)
        return reasons[: p.MAX_REASONS]

    def _offsets(self, search: Search) -> Work[bytes]:
        """Of all that was leased; none if its client has ended meanwhile."""
        offsets = bytearray()
        for start in range(0, len(search.tiers), SLICE):
            if start:
                yield None
            if search.lease is not None:
                offsets += search.lease.offsets(start, start + SLICE)
        return bytes(offsets)

    def _count(self, search: Search) -> None:
        self._counters.add("matches_total")
        self._counters.observe("match_seconds", time.perf_counter() - search.begun)
        for number, name in enumerate(self._names):
            if hits := search.tiers.count(number):
                self._counters.add("hit_chunks_total", hits, tier=name)
        if missed := len(search.keys) - len(search.tiers):
            self._counters.add("missed_chunks_total", missed)


def nothing_of(message: p.Match) -> p.Matched:
    """The answer of a node that is about to end."""
    count = p.count(message.keys, 32)
    why = [Reason(Why.NO_NODE, count, detail=DRAINING)] if count else []
    return p.Matched(message.id, 0, b"", b"", why=why)
