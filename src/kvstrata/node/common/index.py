"""What one tier holds: which chunks, how many bytes, and whom to evict next.

An index is plain state on the node's loop, without locks and without I/O. It keeps the objects of
a chunk together, because a chunk lives and dies as one: a chunk that lacks one rank's object is
of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from kvstrata.node.common.changes import Cause, Changes
from kvstrata.policies.base import Policy

E = TypeVar("E")


class Index(Generic[E]):
    """Chunks of one tier, each with an entry per part (``group << 16 | rank``).

    ``used_bytes`` never exceeds ``capacity_bytes``: `claim` bytes first, then `put` the object
    that takes them, or give them back with `unclaim`. Bytes of objects that have left the index
    and still lie in the tier stay claimed until they are gone.

    Args:
        capacity_bytes: the hard bound.
        policy: orders the chunks for eviction; owned by the index.
        nbytes_of: size of an entry's object in bytes.
    """

    def __init__(self, capacity_bytes: int, policy: Policy, nbytes_of: Callable[[E], int]) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.claimed_bytes = 0
        self.num_objects = 0
        self._policy = policy
        self._nbytes_of = nbytes_of
        # A flat tuple (part, entry, part, entry, ...) costs a third of a dict per chunk.
        self._chunks: dict[bytes, tuple[object, ...]] = {}
        self._tier, self._changes = "", Changes()

    def tell(self, tier: str, changes: Changes) -> None:
        """Tell of every change from now on, as one of this tier."""
        self._tier, self._changes = tier, changes

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

    def parts(self) -> dict[bytes, tuple[object, ...]]:
        """Key to (part, entry, part, entry, ...) of all that is here now: some ms a million."""
        return self._chunks.copy()

    def keys(self) -> Iterable[bytes]:
        """All chunk keys; not to be kept across a change."""
        return self._chunks.keys()

    def claim(self, nbytes: int) -> bool:
        """Set bytes aside for an object that is about to be written; False when they do not fit."""
        if self.used_bytes + nbytes > self.capacity_bytes:
            return False
        self.claim_existing(nbytes)
        return True

    def claim_existing(self, nbytes: int) -> None:
        """Count bytes that lie in the tier already, whatever the bound says."""
        self.used_bytes += nbytes
        self.claimed_bytes += nbytes

    def unclaim(self, nbytes: int) -> None:
        """Give claimed bytes back."""
        assert 0 <= nbytes <= self.claimed_bytes
        self.used_bytes -= nbytes
        self.claimed_bytes -= nbytes

    def put(self, key: bytes, part: int, entry: E, cost: float = 0.0) -> E | None:
        """Enter an object whose bytes were claimed; returns the entry it replaces, if any.

        Args:
            key: of its chunk.
            part: which object of the chunk.
            entry: what is to be known of it.
            cost: what computing the chunk takes, in seconds; 0: unknown.
        """
        nbytes = self._nbytes_of(entry)
        assert nbytes <= self.claimed_bytes
        self.claimed_bytes -= nbytes
        flat = self._chunks.get(key)
        if flat is None:
            self._chunks[key] = (part, entry)
            self.num_objects += 1
            self._policy.insert(key, nbytes, cost)
            self._changes.entered(self._tier, key, part)
            return None
        flat, replaced = _without(flat, part)
        if replaced is None:
            self.num_objects += 1
        else:
            self.used_bytes -= self._nbytes_of(replaced)  # type: ignore[arg-type]
        self._chunks[key] = (*flat, part, entry)
        # The policy weighs whole chunks.
        weight = sum(self._nbytes_of(item) for _, item in self.objects(key))
        self._policy.insert(key, weight, cost)
        self._changes.entered(self._tier, key, part)
        return replaced  # type: ignore[return-value]

    def amend(self, key: bytes, part: int, entry: E) -> None:
        """Note something new about an object that is here and keeps its size."""
        flat, before = _without(self._chunks[key], part)
        assert self._nbytes_of(entry) == self._nbytes_of(before)  # type: ignore[arg-type]
        self._chunks[key] = (*flat, part, entry)

    def pop(self, key: bytes, part: int, cause: Cause) -> E | None:
        """Take one object out and return its entry."""
        rest, entry = _without(self._chunks.get(key, ()), part)
        if entry is None:
            return None
        if rest:
            self._chunks[key] = rest
        else:
            del self._chunks[key]
            self._policy.remove(key)
        self.used_bytes -= self._nbytes_of(entry)  # type: ignore[arg-type]
        self.num_objects -= 1
        self._changes.left(self._tier, key, part, cause)
        return entry  # type: ignore[return-value]

    def pop_chunk(self, key: bytes, cause: Cause) -> list[tuple[int, E]]:
        """Take a whole chunk out."""
        objects = list(self.objects(key))
        if objects:
            del self._chunks[key]
            self._policy.remove(key)
            self.used_bytes -= sum(self._nbytes_of(entry) for _, entry in objects)
            self.num_objects -= len(objects)
        for part, _ in objects:
            self._changes.left(self._tier, key, part, cause)
        return objects

    def clear(self) -> dict[bytes, tuple[object, ...]]:
        """Forget all chunks, in no time however many there are; their bytes stay claimed.

        Returns:
            What was here: key to (part, entry, part, entry, ...).
        """
        chunks, self._chunks = self._chunks, {}
        self._policy = type(self._policy)(self._policy.capacity_bytes, self._policy.clock)
        self.claimed_bytes = self.used_bytes
        self.num_objects = 0
        self._changes.emptied(self._tier)
        return chunks

    def cost_of(self, key: bytes) -> float:
        """What computing a chunk takes, as far as the policy minds it; 0: unknown."""
        return self._policy.cost_of(key)

    def touch(self, keys: list[bytes]) -> None:
        """Note the use of a prefix, given head first.

        The policy hears of its tail first, so that under recency a tail is evicted before its head.
        """
        self._policy.touch_all(reversed(keys))

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The chunk to evict next among those that may go; it leaves the policy, not the index."""
        return self._policy.evict(evictable)

    def take(self, key: bytes) -> None:
        """Let a chunk that `victim` passed over leave the policy, as if it had been the victim."""
        self._policy.take(key)

    def unpark(self, key: bytes) -> None:
        """Note that a chunk which might not go, when `victim` asked, may go now."""
        self._policy.unpark(key)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the conservation laws hold."""
        total = sum(
            self._nbytes_of(entry) for key in self._chunks for _, entry in self.objects(key)
        )
        count = sum(len(flat) // 2 for flat in self._chunks.values())
        assert total + self.claimed_bytes == self.used_bytes, (
            f"{total} bytes held + {self.claimed_bytes} claimed != {self.used_bytes} used"
        )
        assert 0 <= total <= self.capacity_bytes
        assert self.claimed_bytes >= 0
        # Beyond the bound lies only what a scan found there and is being deleted.
        assert self.used_bytes <= self.capacity_bytes or self.claimed_bytes
        assert count == self.num_objects
        assert len(self._policy) == len(self._chunks)
        assert all(key in self._policy for key in self._chunks)
        self._policy.check_integrity()


def _without(flat: tuple[object, ...], part: int) -> tuple[tuple[object, ...], object | None]:
    """A chunk's entries without one part's, and that one's entry."""
    for i in range(0, len(flat), 2):
        if flat[i] == part:
            return flat[:i] + flat[i + 2 :], flat[i + 1]
    return flat, None
