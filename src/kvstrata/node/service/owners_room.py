"""Room for what an owner stores in an owned tier: at a quota's end the owner's own goes first.

What was evicted is the owner's no longer. Until it is deleted it counts as the tier's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvstrata.node.common.changes import Cause
from kvstrata.node.common.index import Index
from kvstrata.node.common.owners import Account
from kvstrata.node.service.removals import Removals
from kvstrata.observe.counters import Counters

LEARNT = 4
"""Chunks that go at most for each one that is learnt: what was too much before goes with it."""


class OwnersRoom:
    """Keeps the owners of one tier to their quotas.

    Args:
        index: of the tier.
        removals: delete what is evicted.
        tier: its name.
        counters: the node's.
    """

    def __init__(
        self, index: Index[int], removals: Removals, tier: str, counters: Counters
    ) -> None:
        self._tier = tier
        self._counters = counters
        self._index = index
        self._removals = removals

    @contextmanager
    def taking(self, key: bytes, owner: bytes, nbytes: int) -> Iterator[bool]:
        """In here so many bytes of an owner are on their way; False: the owner has too much.

        Evicts what it must of the owner's own. What would join a chunk that fills another's quota
        is refused as well.
        """
        account = self._index.owners.account(owner)
        while (strange := not self._index.takes(key, owner)) or account.lacks(nbytes):
            if strange or not self._evict_one(account):
                self._index.owners.settle(account)
                self._counters.add("over_quota_objects_total", tier=self._tier)
                yield False
                return
        self._index.owners.fill(account, nbytes)
        try:
            yield True
        finally:
            self._index.owners.fill(account, -nbytes)

    def keep_learnt(self, owner: bytes) -> None:
        """Evict what an owner has too much of since it is known whose it is: a chunk, or so."""
        account = self._index.owners.account(owner)
        self.keep_to_quota(account, LEARNT)
        self._index.owners.settle(account)

    def keep_to_quota(self, account: Account, count: int) -> bool:
        """Evict what an owner has too much of, so many chunks at most; whether there is more."""
        for _ in range(count):
            if not (account.lacks(0) and self._evict_one(account)):
                return False
        return account.lacks(0)

    def _evict_one(self, account: Account) -> bool:
        victim = self._index.victim_of(account, lambda _: True)
        if victim is None:
            return False
        self._counters.add("evicted_chunks_total", tier=self._tier)
        self._removals.run(self._removals.condemn_chunk(victim, Cause.EVICTED))
        return True
