"""Least recently used: who was used longest ago goes first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from kvstrata.policies.base import Policy, check_arguments, unknown_key


class LRU(Policy):
    """Least recently used. Exact among unleased keys (see `Policy.evict`); ignores cost."""

    def __init__(self, capacity_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity_bytes, clock)
        # Not a plain dictionary: that one gets slow at its front as keys are taken from there.
        self._sizes: OrderedDict[bytes, int] = OrderedDict()

    def insert(self, key: bytes, nbytes: int, cost: float = 0.0) -> None:
        check_arguments(nbytes, cost)
        if key in self:
            self.remove(key)
        self._sizes[key] = nbytes
        self._total_bytes += nbytes

    def touch(self, key: bytes) -> None:
        if key in self._sizes:
            self._sizes.move_to_end(key)
            return
        nbytes = self.parking.discard(key)
        if nbytes is None:
            raise unknown_key(key)
        self._sizes[key] = nbytes

    def touch_all(self, keys: Iterable[bytes]) -> None:
        # A match touches hundreds of keys at once, in two tiers: no call for each.
        sizes, move_to_end = self._sizes, self._sizes.move_to_end
        for key in keys:
            if key in sizes:
                move_to_end(key)
            elif key in self.parking:
                self.touch(key)

    def remove(self, key: bytes) -> None:
        nbytes = self._sizes.pop(key, None) or self.parking.discard(key)
        if nbytes is not None:
            self._total_bytes -= nbytes

    def __len__(self) -> int:
        return len(self._sizes) + len(self.parking)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes or key in self.parking

    def keys(self) -> Iterator[bytes]:
        for key, _ in self.parking.items():
            yield key
        yield from self._sizes

    def _pop(self) -> tuple[bytes, int] | None:
        return self._sizes.popitem(last=False) if self._sizes else None

    def check_integrity(self) -> None:
        parked = dict(self.parking.items())
        assert not parked.keys() & self._sizes.keys(), "a key stands in two places"
        total = sum(parked.values()) + sum(self._sizes.values())
        assert total == self._total_bytes, f"{total} bytes held, {self._total_bytes} counted"
