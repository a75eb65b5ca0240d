"""What boundaries cost: the time until what each needs is here, and the rest is computed.

A boundary is priced by what it needs and is not in host memory, never by the whole prefix: of full
attention every chunk before it, of windows the last ones, of states the last. So a shorter boundary
may cost as much to load as a longer one, and each of some is reckoned for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstrata.node.bounds import Bounds
from kvstrata.node.common.planner import Link
from kvstrata.node.common.slices import Work
from kvstrata.node.locating import Located
from kvstrata.node.searching import Search
from kvstrata.node.service.promotions import Wanted
from kvstrata.node.slots.boundaries import longest
from kvstrata.node.slots.slot import Slot

NUM_OFFERS = 32
"""Boundaries that are reckoned, about evenly spread, besides the longest one in host memory."""
SLICE = 64
"""Objects that one slice looks for."""

Loads = dict[int, int]
"""Bytes to bring, by the number of the tier that has them."""
GONE: Loads = {1: 1 << 62}
"""What was there when it was looked for, and is not any more: no boundary that needs it pays."""


class Offer(NamedTuple):
    """A boundary, and what it would take.

    Args:
        boundary: number of chunks before it.
        load_s: what bringing what it needs takes.
        rest_s: what computing the chunks behind it takes, of those that were found.
    """

    boundary: int
    load_s: float
    rest_s: float


class Prices:
    """Of one match.

    Args:
        search: the match.
        bounds: its boundaries.
        locate: says where the parts of a chunk are, see `Matcher.locate`.
        prepared: what is wanted in a slot, and not on its way yet; None: nothing is.
        lower: finds the longest boundary of so many chunks at most.
        tiers: numbers of the slower tiers, by name, from 1 on.
        links: to these, in the same order.
    """

    def __init__(
        self,
        search: Search,
        bounds: Bounds,
        locate: Callable[..., Located | None],
        prepared: Callable[[Slot], Wanted | None],
        lower: Callable[[int], Work[int]],
        tiers: dict[str, int],
        links: Sequence[Link],
    ) -> None:
        self._search = search
        self._bounds = bounds
        self._locate = locate
        self._prepared = prepared
        self._lower = lower
        self._tiers = tiers
        self._links = links
        self._known: dict[tuple[int, int], Loads] = {}  # by part and number of the chunk
        self._full: list[Loads] = [{}]  # of what every chunk is needed of, before each chunk

    def best(self, found: int) -> Work[Offer]:
        """The boundary that takes least; of equals the longest.

        Args:
            found: the longest boundary that can be had.
        """
        yield from self._price_full(found)
        best = yield from self._offer(found, found)
        if not self._search.prefill.known:
            return best
        search, step = self._search, max(1, found // NUM_OFFERS)
        search.here = yield from self._in_host(found)
        boundary, places = found, {0, search.here}
        while boundary > step:
            boundary = yield from self._lower(boundary - step)
            places.add(boundary)
        for boundary in sorted(places - {found}, reverse=True):
            offer = yield from self._offer(boundary, found)
            if offer.load_s + offer.rest_s < best.load_s + best.rest_s:
                best = offer
        return best

    def _offer(self, boundary: int, found: int) -> Work[Offer]:
        bounds, loads = self._bounds, dict(self._full[boundary])
        for part, need in zip(bounds.parts, bounds.needs_at(boundary), strict=True):
            for number in range(max(0, boundary - need), boundary) if need else ():
                if (part, number) not in self._known and len(self._known) % SLICE == SLICE - 1:
                    yield None
                _add(loads, self._of(part, number))
        times = [self._links[tier - 1].seconds(nbytes) for tier, nbytes in loads.items()]
        rest_s = self._search.prefill.seconds(boundary, found)
        return Offer(boundary, max(times, default=0.0), rest_s)

    def _price_full(self, found: int) -> Work[None]:
        for number in range(found):
            if number % SLICE == SLICE - 1:
                yield None
            loads = self._full[-1]
            more = self._look(self._bounds.full, number) if self._bounds.full else {}
            if more:
                loads = dict(loads)
                _add(loads, more)
            self._full.append(loads)

    def _in_host(self, found: int) -> Work[int]:
        """The longest boundary for which nothing has to be brought."""
        most = next((i - 1 for i, loads in enumerate(self._full) if loads), found)
        needs = self._bounds.needs_at(most)

        def there(column: int, number: int) -> bool:
            return not self._of(self._bounds.parts[column], number)

        boundary, _ = yield from longest(needs, most, there)
        return boundary

    def _of(self, part: int, number: int) -> Loads:
        known = self._known.get((part, number))
        if known is None:
            known = self._known[part, number] = self._look((part,), number)
        return known

    def _look(self, parts: tuple[int, ...], number: int) -> Loads:
        """What of these parts of a chunk has to be brought."""
        search, key = self._search, self._search.keys[number]
        located = self._locate(key, parts, search.orders, search.sizes_of(key), search.among)
        if located is None:
            return GONE
        loads: Loads = {}
        for place in located.places:
            # What this match has made a slot for is not on its way before it is decided.
            one = place if isinstance(place, Wanted) else self._prepared(place)
            if one is not None:
                _add(loads, {self._tiers[one.backing.name]: one.size})
        return loads


def _add(loads: Loads, more: Loads) -> None:
    for tier, nbytes in more.items():
        loads[tier] = loads.get(tier, 0) + nbytes
