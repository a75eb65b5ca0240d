"""Why the chunks behind a match are not there: said at once, since the request will store them.

The first missing chunk gets an answer from everything that is known. Those behind it are of no use
without it, so each has a reason of its own only where it has one: it left a tier, or never came.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass

from msgspec.structs import replace

from kvstrata.node.common.changes import Changes
from kvstrata.node.common.slices import Work
from kvstrata.node.operating.departures import Departures, name_of
from kvstrata.node.operating.kin import Asked, Kin
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.reservations import ReservationTable
from kvstrata.observe.reasons import Reason, Why
from kvstrata.wire.namespaces import Described, differing
from kvstrata.wire.operating import MAX_REASONS

SLICE = 512
"""Chunks that one slice looks at."""

_OF_STRANGERS = (Why.NAMESPACE, Why.TIER_OFF, Why.DEADLINE)
"""Causes that hold as well for the chunks behind that are known to nobody here."""


@dataclass(frozen=True)
class Missing:
    """The chunks of a prompt that a match did not find.

    Args:
        asked: how the prompt begins, as far as the engine said so.
        keys: of its missing chunks, in order.
        at_start: whether not even the first chunk was found.
        parts: that make up a chunk.
        cut: which cap ended the match; empty: none did.
        shared: whether shared tiers were to be asked.
        late: tiers that did not answer in time.
        among: the tiers that might be used; none: all.
    """

    asked: Asked | None
    keys: Sequence[bytes]
    at_start: bool
    parts: tuple[int, ...]
    cut: str = ""
    shared: bool = True
    late: Sequence[str] = ()
    among: Collection[str] = ()


class Reasons:
    """Says why chunks are missing.

    Args:
        host: host memory.
        changes: of the node's own tiers.
        backings: the slower tiers.
        reservations: what is being written.
        describe: what a namespace is made of, by its digest; None: nobody has said.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        host: HostMemory,
        changes: Changes,
        backings: Sequence[Backing],
        reservations: ReservationTable,
        describe: Callable[[bytes], Described | None],
        clock: Callable[[], float],
    ) -> None:
        self._host = host
        self.backings = backings
        self._owned = [backing for backing in backings if isinstance(backing, OwnedBacking)]
        self._reservations = reservations
        self.describe = describe
        self.clock = clock
        self.departures = Departures(clock)
        changes.watch(self.departures)
        self.kin = Kin()

    def of(self, missing: Missing, *, across: bool = False) -> Work[list[Reason]]:
        """Why they are not there, in order; `MAX_REASONS` at most.

        Args:
            missing: what was not found; at least one chunk.
            across: whether it may be said that another tenant or salt has the same.
        """
        first = self._first(missing, across=across)
        runs = [(first, 1)]
        for start in range(1, len(missing.keys), SLICE):
            if start > 1:
                yield None
            self._go_on(runs, missing, missing.keys[start : start + SLICE])
        return [replace(reason, chunks=count) for reason, count in runs]

    def _go_on(
        self, runs: list[tuple[Reason, int]], missing: Missing, keys: Sequence[bytes]
    ) -> None:
        """Say the same of the next chunks behind the first one, by runs of what is alike."""
        first = runs[0][0]
        stranger = first if first.why in _OF_STRANGERS else Reason(Why.NEVER, 1)
        names = [name_of(key) for key in keys]
        held = self._held_among(set(keys))
        known = self.departures.among(set(names))
        writing, parts = self._reservations.is_being_written, missing.parts
        one, count = runs.pop()
        for key, name in zip(keys, names, strict=True):
            following = stranger
            if key in held:
                following = first  # it would be used if the first one were there
            elif writing(key, parts):
                following = Reason(Why.ARRIVING, 1)
            elif name in known:
                following = self._left(name) or stranger
            if following is one or one.goes_on(following) or len(runs) == MAX_REASONS - 1:
                count += 1
            else:
                runs.append((one, count))
                one, count = following, 1
        runs.append((one, count))

    def of_boundary(self, key: bytes, count: int, late: Sequence[str] = ()) -> Reason:
        """Why so many chunks that are there have no boundary behind them: one lacks something."""
        if late:
            return Reason(Why.DEADLINE, count, late[0], "lookup")
        left = self._left(name_of(key)) or Reason(Why.NEVER, 1, detail="parts")
        return replace(left, chunks=count)

    def _first(self, missing: Missing, *, across: bool) -> Reason:
        """Why the first missing chunk is not there."""
        key = missing.keys[0]
        if missing.cut:
            return Reason(Why.CAPPED, 1, detail=missing.cut)
        held_by = [one for one in self._owned if key in one.index]
        off = [one for one in held_by if not one.readable]
        if off:
            return Reason(Why.TIER_OFF, 1, off[0].name, off[0].state)
        left_out = [one.name for one in held_by if missing.among and one.name not in missing.among]
        if left_out and key not in self._host.index:
            return Reason(Why.CAPPED, 1, left_out[0], "tiers")
        if held_by or key in self._host.index:
            return self._of_held(missing, [one.name for one in held_by])
        if self._reservations.is_being_written(key, missing.parts):
            return Reason(Why.ARRIVING, 1)
        left = self._left(name_of(key))
        if left is not None and left.why is Why.CLEARED:
            return left
        if missing.late:
            return Reason(Why.DEADLINE, 1, missing.late[0], "lookup")
        not_asked = [
            one
            for one in self.backings
            if missing.shared and one.must_be_asked and not one.readable
        ]
        if stores := [one for one in not_asked if one.takes_writes]:
            return Reason(Why.TIER_OFF, 1, stores[0].name, stores[0].state)
        if left is not None:
            return left
        if missing.at_start and missing.asked is not None:
            kin = self.elsewhere(missing.asked, across=across)
            if kin is not None:
                return kin
        unknown = [*(one for one in self._owned if one.state == "scanning"), *not_asked]
        if unknown:
            return Reason(Why.TIER_OFF, 1, unknown[0].name, unknown[0].state)
        cleared_at = self.departures.cleared_at
        return Reason(Why.NEVER, 1, ago_s=self._ago(cleared_at))

    def _of_held(self, missing: Missing, tiers: list[str]) -> Reason:
        """Why a chunk is of no use that is there, or was there a moment ago."""
        key, names = missing.keys[0], ["host", *tiers]
        there = {part for part, _ in self._host.index.objects(key)}
        for one in self._owned:
            there.update(part for part, _ in one.index.objects(key))
        tier = names[0] if key in self._host.index else names[1]
        if not there.issuperset(missing.parts):
            if self._reservations.is_being_written(key, missing.parts):
                return Reason(Why.ARRIVING, 1)
            left = self._left(name_of(key))
            return left or Reason(Why.NEVER, 1, tier, "parts")
        return Reason(Why.ORDER, 1, tier)

    def elsewhere(self, asked: Asked, *, across: bool) -> Reason | None:
        """Under which other namespace the same tokens are stored now, if nothing hides whose."""
        found: list[tuple[int, str]] = []
        for other in self.kin.others(asked, of_all=across):
            if not self._held_among({other.key}):
                continue
            parts = self._differences(asked, other)
            found.append((len(parts), ", ".join(parts)))
        return Reason(Why.NAMESPACE, 1, detail=min(found)[1]) if found else None

    def _differences(self, one: Asked, other: Asked) -> list[str]:
        if one.namespace == other.namespace:
            return ["salt"]
        mine, theirs = self.describe(one.namespace), self.describe(other.namespace)
        parts = differing(theirs, mine) if mine and theirs else ["unknown"]
        return parts if one.owner == other.owner or "tenant" in parts else [*parts, "salt"]

    def _held_among(self, keys: Set[bytes]) -> set[bytes]:
        """Which of these chunks are in one of the node's own tiers."""
        return self._host.index.among(keys).union(*(one.index.among(keys) for one in self._owned))

    def _left(self, name: bytes) -> Reason | None:
        left = self.departures.of(name)
        return None if left is None else Reason(
            Why(left.cause.value), 1, left.tier, ago_s=self._ago(left.at)
        )  # fmt: skip

    def _ago(self, at: float | None) -> float:
        return 0.0 if at is None else round(self.clock() - at, 3)
