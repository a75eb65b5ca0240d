"""Answers an operator who asks why: of a request that has ended, or of a prompt as it is now."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from kvstrata.errors import UsageError
from kvstrata.heads import checked_heads
from kvstrata.node.common.slices import in_slices
from kvstrata.node.operating.kin import Asked
from kvstrata.node.operating.reasons import Missing, Reasons
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.slots.clients import Client
from kvstrata.observe.reasons import Reason, Unloaded, Why
from kvstrata.wire import protocol as p

_List = list[Unloaded]


class Looked(NamedTuple):
    """What is there of a prompt.

    Args:
        tiers: of each chunk that a match would lease, or that is there; 255 of the others.
        end: how many leading chunks have all that is needed of every chunk.
        hole: the chunk without which that end is no boundary; -1: it is one.
    """

    tiers: bytes
    end: int
    hole: int


class Explainer:
    """Explains requests and prompts.

    Args:
        find: the last record of a request, by its id or a part of it; None: there is none.
        look: says what is there of a prompt.
        reasons: of what is missing.
    """

    def __init__(
        self,
        find: Callable[[str], dict[str, Any] | None],
        look: Callable[[p.Lookup], Awaitable[Looked]],
        reasons: Reasons,
    ) -> None:
        self._find = find
        self._look = look
        self._reasons = reasons

    def explain(self, client: Client, message: p.Explain) -> p.Explained | Awaitable[p.Explained]:
        """Say what became of a request, or what would become of a prompt.

        Raises:
            UsageError: no such request is remembered, its record names no key, or it is no
                prompt.
        """
        if not message.request:
            return self._of_prompt(message)
        record = self._find(message.request)
        if record is None:
            raise UsageError(f"no record of a request {message.request!r} is kept")
        elsewhere: list[Reason] = []
        if message.across:
            try:
                first = bytes.fromhex(str(record.get("first_key", "")))
            except ValueError as error:
                raise UsageError(f"the first key of {message.request!r} is none") from error
            asked = self._reasons.kin.known(first)
            found = asked and self._reasons.elsewhere(asked, across=True)
            elsewhere = [found] if found else []
        return p.Explained(message.id, record, b"", elsewhere)

    async def _of_prompt(self, message: p.Explain) -> p.Explained:
        told = self._reasons.describe(message.namespace)
        parts, orders = (told.objects, told.orders) if told else ([], [])
        keys = p.split(message.keys, 32)
        if not keys:
            raise UsageError("a prompt of no whole chunk has nothing to explain")
        asked = Asked(keys[0], message.namespace, message.owner, checked_heads(message.heads))
        found = await self._look(
            p.Lookup(message.id, message.keys, parts or [0], orders, message.namespace)
        )
        place = found.tiers.find(p.ABSENT)
        if place < 0:
            return p.Explained(message.id, {}, found.tiers, [])
        reasons = []
        if place < found.end:
            hole = found.hole if found.hole >= 0 else place
            reasons.append(self._reasons.of_boundary(keys[hole], found.end - place))
        if keys := keys[found.end :]:
            needs = told.needs_of(parts) if told else []
            every = [part for part, need in zip(parts, needs, strict=False) if not need] or parts
            missing = Missing(
                asked, keys, not found.end, tuple(every or [0]), shared=bool(orders)
            )  # fmt: skip
            work = in_slices(self._reasons.of(missing, across=message.across))
            reasons += await work if isinstance(work, Awaitable) else work
        return p.Explained(message.id, {}, found.tiers[:place], reasons[: p.MAX_REASONS])

    def complete(self, record: dict[str, Any]) -> None:
        """Say in a request's record why a chunk did not come that was on its way.

        Raises:
            UsageError: its reasons are none.
        """
        arrived_at = record.pop("arrived_at", None)
        if "reasons" not in record:
            return
        try:
            reasons = msgspec.convert(record["reasons"], _List)
            # Both ends read one clock of their machine, however late this is heard.
            if arrived_at is None:
                arrived_at = time.monotonic() - float(record.get("seconds", 0.0))
            ago = time.monotonic() - float(arrived_at)
            begin = self._reasons.clock() - ago
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            raise UsageError(f"a record with reasons that are none: {error}") from error
        if any(one.key for one in reasons):
            record["reasons"] = msgspec.to_builtins(
                [self._completed(one, begin) if one.key else one for one in reasons]
            )

    def _completed(self, one: Unloaded, begin: float) -> Unloaded:
        try:
            key = bytes.fromhex(one.key)
        except ValueError as error:
            raise UsageError(f"{one.key!r} is no key") from error
        left = self._reasons.departures.since(key, begin)
        if left is not None:
            why, tier, ago_s = Why(left.cause.value), left.tier, self._reasons.clock() - left.at
            return replace(one, why=why, tier=tier, ago_s=round(ago_s, 3))
        for backing in self._reasons.backings:
            has = isinstance(backing, OwnedBacking) and key in backing.index
            if (has or backing.name == one.tier) and not backing.readable:
                return replace(one, why=Why.TIER_OFF, tier=backing.name, detail=backing.state)
            if has:
                return replace(one, why=Why.DEADLINE, tier=backing.name, detail="load")
        return one
