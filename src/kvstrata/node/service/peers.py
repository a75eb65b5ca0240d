"""Other nodes' host memory in the node's service: read, and never changed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

from kvstrata.node.service.backing import Question
from kvstrata.node.service.names import Where
from kvstrata.node.service.shared import SharedBacking
from kvstrata.tiers.base import Outcome, Stat
from kvstrata.tiers.marks import Mark
from kvstrata.tiers.peer import PeerTier
from kvstrata.transfer import peers as p
from kvstrata.transfer.tcp import Address

MAX_NAME = 256
"""Characters of an address that are looked at."""


class PeerBacking(SharedBacking):
    """A `SharedBacking` that takes no writes, and whose contents are nobody's to clear here.

    Args:
        tier: the peers.
        why_not: why a request may not name an address; empty where it may.
        others: as of `SharedBacking`.
    """

    tier: PeerTier
    takes_writes = False

    def __init__(self, tier: PeerTier, *, why_not: Callable[[Address], str], **others: Any) -> None:
        super().__init__(tier, **others)
        self._why_not = why_not

    def named(self, name: str) -> tuple[Address | None, str]:
        """The peer that a request names, or why it is not asked."""
        try:
            address = Address.parse(name[:MAX_NAME])
        except ValueError as error:
            return None, f"the peer is no address: {error}"
        why = self._why_not(address)
        return (None, why) if why else (address, "")

    async def tell(self, peer: Address, request: p.Fetch | p.Watch) -> p.Fetching:
        """Ask a peer to fetch something from here, or how far it is.

        Raises:
            TierUnavailable: it does not answer, or answers something else.
        """
        return await self._calls.call("request", partial(self.tier.tell, peer, request))

    def fails(self, peer: Address) -> bool:
        """Whether a peer that a request names has failed lately."""
        return self.tier.fails(peer)

    def _stat(self, question: Question, names: Sequence[bytes]) -> list[Stat | Outcome]:
        # Of windows and states the one of a chunk says nothing of the next one's.
        return self.tier.stat_of(names, question.peer, head_first=not any(question.needs))

    async def run(self) -> None:
        """Keep up with who answers; how fast they are, the first loads will tell."""
        self._timed = True
        await self._presence.run()

    def clear(self) -> Awaitable[int]:
        """Forget what was seen; what peers have is theirs."""
        self._hints.clear()
        return _nothing()

    def drop(self, keys: Iterable[bytes]) -> Awaitable[int]:
        for key in keys:
            self._hints.forget_chunk(key)
        return _nothing()

    def mark(self, mark: Mark, *, aged: bool) -> Awaitable[int]:
        """Take nothing of it from any peer."""
        self.marks.add(mark)
        return _nothing()

    def _renewed(self) -> None:
        self._hints.clear()

    @property
    def writable(self) -> bool:
        return False

    @property
    def state(self) -> str:
        return "ok" if self.readable else super().state

    def holdings(self) -> dict[str, Any]:
        return {"shared": True, "written": False, "num_hints": len(self._hints)}

    def _reject(self, key: bytes, part: int, seen: object) -> None:
        # Its own samples will find it; until then it is not asked for that again.
        if isinstance(seen, Where):
            self._hints.refuse(key, part, seen)


async def _nothing() -> int:
    return 0
