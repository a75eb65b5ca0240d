"""What one tier holds: which chunks, how many bytes, and whom to evict next.

An index is plain state on the node's loop, without locks and without I/O. It keeps the objects of
a chunk together, because a chunk lives and dies as one: a chunk that lacks one rank's object is
of no use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Generic, TypeVar

from kvstrata.node.common.changes import Cause, Changes
from kvstrata.node.common.owners import Account, Owners, Tag
from kvstrata.node.common.pinned import Pinned
from kvstrata.node.common.slices import Work
from kvstrata.node.common.spares import Name, Spares
from kvstrata.policies.base import Policy
from kvstrata.tables import Table
from kvstrata.tiers.marks import UNKNOWN, Whose

E = TypeVar("E")

SLICE = 64


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
        self.owners = Owners()
        self.pinned = Pinned()
        self.spares = Spares()
        self._policy = policy
        self._nbytes_of = nbytes_of
        # A flat tuple (tag, part, entry, part, entry, ...) costs a third of a dict per chunk.
        self._chunks: Table[tuple[object, ...]] = Table()
        self._tier, self._changes = "", Changes()

    def tell(self, tier: str, changes: Changes) -> None:
        """Tell of every change from now on, as one of this tier."""
        self._tier, self._changes = tier, changes

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._chunks

    def among(self, keys: Set[bytes]) -> set[bytes]:
        """Which of these chunks are here."""
        pieces = self._chunks.pieces
        return {key for key in keys if key in pieces[key[0]]}

    def get(self, key: bytes, part: int) -> E | None:
        """The entry of one object, or None."""
        flat = self._chunks.get(key)
        if flat is not None:
            for i in range(1, len(flat), 2):
                if flat[i] == part:
                    return flat[i + 1]  # type: ignore[return-value]
        return None

    def objects(self, key: bytes) -> Iterator[tuple[int, E]]:
        """Parts and entries of one chunk."""
        flat = self._chunks.get(key) or ()
        for i in range(1, len(flat), 2):
            yield flat[i], flat[i + 1]  # type: ignore[misc]

    def parts(self) -> Table[tuple[object, ...]]:
        """Key to (tag, part, entry, part, entry, ...) of all that is here: some ms a million."""
        return self._chunks.copy()

    def nbytes(self, key: bytes) -> int:
        """What a chunk's objects weigh together."""
        return sum(self._nbytes_of(entry) for _, entry in self.objects(key))

    def whose(self, key: bytes) -> Whose:
        """Whose a chunk is, as far as that is known."""
        flat = self._chunks.get(key)
        return UNKNOWN if flat is None else _tag(flat).whose

    def keys(self) -> Iterator[bytes]:
        """All chunk keys; not to be kept across a change."""
        return iter(self._chunks)

    def latest(self, count: int) -> list[bytes]:
        """The keys of so many chunks that came last, about."""
        return self._chunks.latest(count)

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

    def put(
        self,
        key: bytes,
        part: int,
        entry: E,
        cost: float = 0.0,
        whose: Whose = UNKNOWN,
        priority: int = 0,
    ) -> E | None:
        """Enter an object whose bytes were claimed; returns the entry it replaces, if any.

        Args:
            key: of its chunk.
            part: which object of the chunk.
            entry: what is to be known of it.
            cost: what computing the chunk takes, in seconds; 0: unknown.
            whose: it is.
            priority: as of `Policy.insert`.
        """
        nbytes = self._nbytes_of(entry)
        assert nbytes <= self.claimed_bytes
        self.claimed_bytes -= nbytes
        flat = self._chunks.get(key)
        if flat is None:
            tag = self.owners.tag(whose)
            self.owners.enter(tag)
            self._chunks[key] = (tag, part, entry)
            replaced, weight = None, nbytes
        else:
            self.learn(key, whose)
            flat, replaced = _without(self._chunks[key], part)
            tag = _tag(flat)
            self._chunks[key] = (*flat, part, entry)
            weight = self.nbytes(key)  # the policy weighs whole chunks
        tag.account.nbytes += nbytes
        if replaced is None:
            self.num_objects += 1
        else:
            before = self._nbytes_of(replaced)  # type: ignore[arg-type]
            self.used_bytes -= before
            tag.account.nbytes -= before
        if whose == UNKNOWN and tag.account.quota_bytes is not None:  # it was there before
            tag.account.ceiling_bytes = max(tag.account.ceiling_bytes, tag.account.used_bytes)
        for policy in self._policies(tag):
            policy.insert(key, weight, cost, priority)
        if tag.account.meanwhile is not None:
            tag.account.used((key,))
        self._changes.entered(self._tier, key, part)
        return replaced  # type: ignore[return-value]

    def adopt(self, found: Sequence[tuple[Name, E]]) -> bool:
        """Enter what a scan found, of which nothing more is known; as `claim` and `put` of each.

        What is here already stays as it is. False: not all of it fits, and nothing has changed.
        """
        sizes = [self._nbytes_of(entry) for _, entry in found]
        if self.used_bytes + sum(sizes) > self.capacity_bytes:
            return False
        pieces, weights, new = self._chunks.pieces, dict[bytes, int](), list[Name]()
        unknown: Tag | None = None
        for (name, entry), nbytes in zip(found, sizes, strict=True):
            key, part = name
            chunks = pieces[key[0]]
            flat = chunks.get(key)
            if flat is None:
                unknown = unknown or self.owners.tag(UNKNOWN)
                self.owners.enter(unknown)
                chunks[key] = (unknown, part, entry)
                unknown.account.nbytes += nbytes
                weights[key] = nbytes
            elif part in flat[1::2]:
                continue
            else:
                chunks[key] = (*flat, part, entry)
                _tag(flat).account.nbytes += nbytes
                weights.pop(key, None)  # it counts as used last
                weights[key] = self.nbytes(key)
            self.used_bytes += nbytes
            new.append(name)
        self.num_objects += len(new)
        self._policy.insert_all(weights)
        if self.owners.num_quotas:
            for key, weight in weights.items():
                self._count_late(_tag(self._chunks[key]).account, key, weight)
        self._changes.found(self._tier, new)
        return True

    def takes(self, key: bytes, owner: bytes) -> bool:
        """Whether an object of this owner may join a chunk: not where it fills another's quota."""
        flat = self._chunks.get(key)
        if flat is None or _tag(flat).whose == UNKNOWN:
            return True
        account = _tag(flat).account
        return account.owner == owner or account.quota_bytes is None

    def learn(self, key: bytes, whose: Whose) -> None:
        """Note whose a chunk is, if it is here and that was not known."""
        flat = self._chunks.get(key)
        if flat is None or whose == UNKNOWN or _tag(flat).whose != UNKNOWN:
            return
        before, tag, nbytes = _tag(flat), self.owners.tag(whose), self.nbytes(key)
        self.owners.enter(tag)
        tag.account.nbytes += nbytes
        before.account.nbytes -= nbytes
        self.owners.leave(before)
        self._chunks[key] = (tag, *flat[1:])
        self._count_late(tag.account, key, nbytes)

    def _count_late(self, account: Account, key: bytes, nbytes: int) -> None:
        """Count a chunk, which was here before anybody knew, against its owner's quota."""
        if account.policy is not None:
            account.policy.insert(key, nbytes, self.cost_of(key), self.priority_of(key))
            account.used((key,))
            account.ceiling_bytes = max(account.ceiling_bytes, account.used_bytes)

    def amend(self, key: bytes, part: int, entry: E) -> None:
        """Note something new about an object that is here and keeps its size."""
        flat, before = _without(self._chunks[key], part)
        assert self._nbytes_of(entry) == self._nbytes_of(before)  # type: ignore[arg-type]
        self._chunks[key] = (*flat, part, entry)

    def pop(self, key: bytes, part: int, cause: Cause) -> E | None:
        """Take one object out and return its entry."""
        rest, entry = _without(self._chunks.get(key) or (), part)
        if entry is None:
            return None
        self.spares.forget((key, part))
        if len(rest) > 1:
            self._chunks[key] = rest
        else:
            del self._chunks[key]
        self._left(key, _tag(rest), self._nbytes_of(entry), 1, gone=len(rest) == 1)  # type: ignore[arg-type]
        self._changes.left(self._tier, key, part, cause)
        return entry  # type: ignore[return-value]

    def pop_chunk(self, key: bytes, cause: Cause) -> list[tuple[int, E]]:
        """Take a whole chunk out."""
        objects = list(self.objects(key))
        if objects:
            tag = _tag(self._chunks[key])
            del self._chunks[key]
            nbytes = sum(self._nbytes_of(entry) for _, entry in objects)
            self._left(key, tag, nbytes, len(objects), gone=True)
        spares = self.spares if len(self.spares) else None
        for part, _ in objects:
            if spares is not None:
                spares.forget((key, part))
            self._changes.left(self._tier, key, part, cause)
        return objects

    def clear(self) -> Iterator[tuple[bytes, tuple[object, ...]]]:
        """Forget all chunks, in no time however many there are; their bytes stay claimed.

        Returns:
            What was here, to be gone through in slices: keys with (tag, part, entry, part, entry,
            ...). To let go of it takes time, too, so nothing else holds it.
        """
        chunks, self._chunks = self._chunks, Table()
        policy, self._policy = self._policy, self._policy.emptied()
        self.owners.clear()
        self.spares.clear()
        self.pinned.clear()
        self.claimed_bytes = self.used_bytes
        self.num_objects = 0
        self._changes.emptied(self._tier)
        return _drained(chunks, policy)

    def cost_of(self, key: bytes) -> float:
        """What computing a chunk takes, as far as the policy minds it; 0: unknown."""
        return self._policy.cost_of(key)

    def priority_of(self, key: bytes) -> int:
        """What a chunk matters more or less than others; 0: nothing was said."""
        return self._policy.priority_of(key)

    def touch(self, keys: list[bytes]) -> None:
        """Note the use of a prefix, given head first.

        The policy hears of its tail first, so that under recency a tail is evicted before its head.
        """
        self._policy.touch_all(reversed(keys))
        if self.owners.num_quotas:
            # A prefix is one owner's.
            first = next((key for key in keys if key in self._chunks), None)
            account = None if first is None else _tag(self._chunks[first]).account
            if account is not None and account.policy is not None:
                account.policy.touch_all(reversed(keys))
                account.used(reversed(keys))

    def note_needs(self, keys: Iterable[bytes], needed: Set[int], passed: Set[int]) -> None:
        """Note which parts of these chunks a match has needed, and which it has passed over."""
        for key in keys:
            for part, _ in self.objects(key):
                if part in needed:
                    self.spares.need((key, part))
                elif part in passed:
                    self.spares.pass_over((key, part))

    def spare(self) -> Name | None:
        """An object to evict by itself, before any chunk; None: there is none. It stays here."""
        while (name := self.spares.take()) is not None:
            if name[0] not in self.pinned:
                return name
        return None

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The chunk to evict next among those that may go; it leaves the policy, not the index."""
        pinned = self.pinned
        if len(pinned):
            return self._policy.evict(lambda key: key not in pinned and evictable(key))
        return self._policy.evict(evictable)

    def victim_of(self, account: Account, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The same among the chunks of an owner who has a quota."""
        assert account.policy is not None
        return account.policy.evict(lambda key: key not in self.pinned and evictable(key))

    def take(self, key: bytes) -> None:
        """Let a chunk that `victim` passed over leave the policy, as if it had been the victim."""
        self._policy.take(key)

    def unpark(self, key: bytes) -> None:
        """Note that a chunk which might not go, when `victim` asked, may go now."""
        self._policy.unpark(key)
        if self.owners.num_quotas and (flat := self._chunks.get(key)) is not None:
            own = _tag(flat).account.policy
            if own is not None:
                own.unpark(key)

    def set_quota(self, owner: bytes, nbytes: int | None) -> Account:
        """Let an owner have so many bytes, or as many as there is room for (None).

        What is too much now goes when it may; `order_for_quota` has to have been through before.
        """
        account = self.owners.account(owner)
        self.owners.num_quotas += (nbytes is not None) - (account.quota_bytes is not None)
        account.quota_bytes = nbytes
        if nbytes is None:
            account.policy = None
            self.owners.settle(account)
        else:
            account.ceiling_bytes = max(nbytes, account.used_bytes)
            account.policy = account.policy or self._policy.emptied()
        return account

    def order_for_quota(self, account: Account) -> Work[None]:
        """Let the owner's policy know of all that the owner has, in the order of all chunks.

        One at a time in an index. What comes, goes or is used meanwhile is in its place at the end.
        """
        if account.policy is None or len(account.policy) == account.num_chunks:
            return
        account.meanwhile, number = OrderedDict(), 0
        try:
            for number, key in enumerate(self._policy.walk(), 1):
                if key is not None and account.policy is not None and key not in account.policy:
                    self._order(account, key)
                if number % SLICE == 0:
                    yield None
            while account.meanwhile:
                key, _ = account.meanwhile.popitem(last=False)
                self._order(account, key)
                number += 1
                if number % SLICE == 0:
                    yield None
        finally:
            account.meanwhile = None

    def _order(self, account: Account, key: bytes) -> None:
        """Tell the owner's policy of a chunk, as one that was used last, if it is this owner's."""
        flat = self._chunks.get(key)
        if account.policy is not None and flat is not None and _tag(flat).account is account:
            cost, priority = self.cost_of(key), self.priority_of(key)
            account.policy.insert(key, self.nbytes(key), cost, priority)

    def _left(self, key: bytes, tag: Tag, nbytes: int, count: int, *, gone: bool) -> None:
        """Objects of a chunk have left; with the last of them it has gone."""
        self.used_bytes -= nbytes
        self.num_objects -= count
        tag.account.nbytes -= nbytes
        tag.account.lowered()
        if gone:
            for policy in self._policies(tag):
                policy.remove(key)
            self.pinned.let_go(key)
            self.owners.leave(tag)

    def _policies(self, tag: Tag) -> Iterable[Policy]:
        own = tag.account.policy
        return (self._policy,) if own is None else (self._policy, own)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the conservation laws hold."""
        total = sum(
            self._nbytes_of(entry) for key in self._chunks for _, entry in self.objects(key)
        )
        count = sum(len(flat) // 2 for _, flat in self._chunks.items())
        held: dict[bytes, int] = {}
        chunks: dict[bytes, int] = {}
        for key, flat in self._chunks.items():
            owner = _tag(flat).account.owner
            assert self.owners.account(owner) is _tag(flat).account
            held[owner] = held.get(owner, 0) + self.nbytes(key)
            chunks[owner] = chunks.get(owner, 0) + 1
        for account in self.owners:
            assert account.nbytes == held.get(account.owner, 0), "bytes of an owner do not sum up"
            assert account.num_chunks == chunks.get(account.owner, 0)
            if account.quota_bytes is not None:
                assert account.used_bytes <= account.ceiling_bytes, "a quota is not kept"
            assert (account.policy is None) == (account.quota_bytes is None)
            if account.policy is not None:
                account.policy.check_integrity()
        assert all(self.get(*name) is not None for name in self.spares.names())
        self.pinned.check_integrity({key: self.nbytes(key) for key in self.pinned})
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


def _drained(
    chunks: Table[tuple[object, ...]], policy: Policy
) -> Iterator[tuple[bytes, tuple[object, ...]]]:
    """What was cleared, taken out one by one."""
    for key, flat in chunks.drain():
        policy.remove(key)
        yield key, flat


def _tag(flat: tuple[object, ...]) -> Tag:
    tag = flat[0]
    assert isinstance(tag, Tag)
    return tag


def _without(flat: tuple[object, ...], part: int) -> tuple[tuple[object, ...], object | None]:
    """A chunk's entries without one part's, and that one's entry."""
    for i in range(1, len(flat), 2):
        if flat[i] == part:
            return flat[:i] + flat[i + 2 :], flat[i + 1]
    return flat, None
