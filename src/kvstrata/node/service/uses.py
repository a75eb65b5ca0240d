"""What of a tier's contents was used lately, in the order that a later scan should find."""

from __future__ import annotations

import asyncio
from collections import deque

from kvstrata.tables import Table

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

    async def take(self) -> deque[bytes]:
        """Keys noted since the last time, each once: the last used last, tails before heads."""
        prefixes, self._prefixes, self._num_keys = self._prefixes, deque(), 0
        seen, used = Table[None](), deque[bytes]()
        while prefixes:
            keys = prefixes.pop()
            for start in range(0, len(keys), SLICE):
                for key in keys[start : start + SLICE]:
                    if key not in seen:
                        seen[key] = None
                        used.appendleft(key)
                await asyncio.sleep(0)
        return used
