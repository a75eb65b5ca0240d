"""What of a tier's contents was used lately, in the order that a later scan should find."""

from __future__ import annotations

import asyncio
from collections import deque

SLICE = 256
MAX_USES = 1 << 18


class Uses:
    """Prefixes that were used, as they come: a note costs a match nothing, the sorting is later."""

    def __init__(self) -> None:
        self._prefixes: deque[list[bytes]] = deque()
        self._num_keys = 0

    def note(self, keys: list[bytes]) -> None:
        """A prefix was used, given head first; the oldest notes go when there are too many."""
        self._prefixes.append(keys)
        self._num_keys += len(keys)
        while self._num_keys > MAX_USES:
            self._num_keys -= len(self._prefixes.popleft())

    async def take(self) -> list[bytes]:
        """Keys noted since the last time, each once: the last used last, tails before heads."""
        prefixes, self._prefixes, self._num_keys = self._prefixes, deque(), 0
        seen: dict[bytes, None] = {}
        for keys in reversed(prefixes):
            for start in range(0, len(keys), SLICE):
                for key in keys[start : start + SLICE]:
                    seen.setdefault(key)
                await asyncio.sleep(0)
        return list(seen)[::-1]
