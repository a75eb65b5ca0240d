"""Other nodes' host memory in the node's service: read, and never changed."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import Any

from kvstrata.node.service.names import Where
from kvstrata.node.service.shared import SharedBacking


class PeerBacking(SharedBacking):
    """A `SharedBacking` that takes no writes, and whose contents are nobody's to clear here."""

    takes_writes = False

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
