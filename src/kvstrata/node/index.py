"""What one tier holds: which chunks, how many bytes, and whom to evict next.

An index is plain state on the node's loop, without locks and without I/O. It keeps the objects of
a chunk together, because a chunk lives and dies as one: a chunk that lacks one rank's object is
of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from kvstrata.policies.base import Policy

E = TypeVar("E")


class Index(Generic[E]):
    """Chunks of one tier, each with an entry per part (``group << 16 | rank``).

    ``used_bytes`` never exceeds ``capacity_bytes``: `claim` bytes first, then `put` the object
    that takes them, or give them back with `unclaim`.

    Args:
        capacity_bytes: the hard bound.
        policy: orders the chunks for eviction; owned by the index.
        nbytes_of: size of an entry's object in bytes.
    """

    def __init__(
        self, capacity_bytes: int, policy: Policy, nbytes_of: Callable[[E], int]
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.claimed_bytes = 0
        self.num_objects = 0
        self._policy = policy
        self._nbytes_of = nbytes_of
        # A flat tuple (part, entry, part, entry, ...) costs a third of a dict per chunk.
        self._chunks: dict[bytes, tuple[object, ...]] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._chunks

    def get(self, key: bytes, part: int) -> E | None:
        """The entry of one object, or None."""
        flat = self._chunks.get(key)
        if flat is not None:
            for i in range(0, len(flat), 2):
                if flat[i] == part:
                    return flat[i + 1]  # type: ignore[return-value]
        return None

    def objects(self, key: bytes) -> Iterator[tuple[int, E]]:
        """Parts and entries of one chunk."""
        flat = self._chunks.get(key, ())
        for i in range(0, len(flat), 2):
            yield flat[i], flat[i + 1]  # type: ignore[misc]

    def keys(self) -> Iterable[bytes]:
        """All chunk keys; not to be kept across a change."""
        return self._chunks.keys()

    def claim(self, nbytes: int) -> bool:
        """Set bytes aside for an object that is about to be written; False when they do not fit."""
        if self.used_bytes + nbytes > self.capacity_bytes:
            return False
        self.used_bytes += nbytes
        self.claimed_bytes += nbytes
        return True

    def unclaim(self, nbytes: int) -> None:
        """Give claimed bytes back."""
        self.used_bytes -= nbytes
        self.claimed_bytes -= nbytes

    def put(self, key: bytes, part: int, entry: E, cost: float = 1.0) -> E | None:
        """Enter an object whose bytes were claimed; returns the entry it replaces, if any."""
        nbytes = self._nbytes_of(entry)
        self.claimed_bytes -= nbytes
        replaced = self.pop(key, part)
        flat = self._chunks.get(key, ())
        self._chunks[key] = (*flat, part, entry)
        self.num_objects += 1
        self._policy.insert(key, nbytes, cost)
        return replaced

    def pop(self, key: bytes, part: int) -> E | None:
        """Take one object out and return its entry."""
        flat = self._chunks.get(key)
        if flat is None:
            return None
        for i in range(0, len(flat), 2):
            if flat[i] == part:
                entry: E = flat[i + 1]  # type: ignore[assignment]
                rest = flat[:i] + flat[i + 2 :]
                if rest:
                    self._chunks[key] = rest
                else:
                    del self._chunks[key]
                    self._policy.remove(key)
                self.used_bytes -= self._nbytes_of(entry)
                self.num_objects -= 1
                return entry
        return None

    def pop_chunk(self, key: bytes) -> list[tuple[int, E]]:
        """Take a whole chunk out."""
        objects = list(self.objects(key))
        if objects:
            del self._chunks[key]
            self._policy.remove(key)
            self.used_bytes -= sum(self._nbytes_of(entry) for _, entry in objects)
            self.num_objects -= len(objects)
        return objects

    def touch(self, keys: list[bytes]) -> None:
        """Note the use of a prefix, given head first.

        The policy hears of its tail first, so that under recency a tail is evicted before its head.
        """
        for key in reversed(keys):
            if key in self._chunks:
                self._policy.touch(key)

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The chunk to evict next among those that may go; it leaves the policy, not the index."""
        return self._policy.evict(evictable)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the conservation laws hold."""
        total = sum(
            self._nbytes_of(entry) for key in self._chunks for _, entry in self.objects(key)
        )
        count = sum(len(flat) // 2 for flat in self._chunks.values())
        assert total + self.claimed_bytes == self.used_bytes, (
            f"{total} bytes held + {self.claimed_bytes} claimed != {self.used_bytes} used"
        )
        assert 0 <= self.used_bytes <= self.capacity_bytes
        assert count == self.num_objects
        assert len(self._policy) == len(self._chunks)
        assert all(key in self._policy for key in self._chunks)
        self._policy.check_integrity()
