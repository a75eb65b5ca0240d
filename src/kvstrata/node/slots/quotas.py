"""What owners with a quota may have in host memory: their own goes before they are refused."""

from __future__ import annotations

from collections.abc import Callable

from kvstrata.node.common.owners import Account, Owners
from kvstrata.node.slots.slot import Slot
from kvstrata.observe.counters import Counters
from kvstrata.tiers.marks import Whose


class HostQuotas:
    """Keeps owners to their quotas.

    Args:
        owners: of host memory.
        takes: whether an object of an owner may join a chunk, see `Index.takes`.
        evict_one: evicts a chunk of an owner; False if none may go.
        counters: the node's.
    """

    def __init__(
        self,
        owners: Owners,
        takes: Callable[[bytes, bytes], bool],
        evict_one: Callable[[Account], bool],
        counters: Counters,
    ) -> None:
        self._owners = owners
        self._takes = takes
        self._evict_one = evict_one
        self._counters = counters

    def within(self, account: Account, nbytes: int, count: int) -> int:
        """How many objects of this size their owner may have beside what stays of the owner's."""
        if account.quota_bytes is None:
            return count
        while account.lacks(count * nbytes) and self._evict_one(account):
            pass
        allowed = max(0, account.quota_bytes - account.used_bytes) // nbytes
        self._refuse(count - allowed)
        return min(count, allowed)

    def may_publish(self, key: bytes, slot: Slot, whose: Whose) -> bool:
        """Whether what came into a slot may stay, now that it is known whose it is and what for.

        Evicts of the owner's own what is too much; false: it must be discarded, and is counted.
        """
        account = self._owners.account(whose.owner)
        lacks = not self._takes(key, whose.owner)
        if not lacks and account is not slot.account:
            while account.lacks(slot.nbytes) and self._evict_one(account):
                pass
            lacks = account.lacks(slot.nbytes)
        self._refuse(lacks)
        self._owners.settle(account)
        return not lacks

    def keep_to_quota(self, account: Account, count: int) -> bool:
        """Evict what an owner has too much of, so many chunks at most; whether there is more."""
        for _ in range(count):
            if not (account.lacks(0) and self._evict_one(account)):
                return False
        return account.lacks(0)

    def _refuse(self, count: int) -> None:
        if count > 0:
            self._counters.add("over_quota_objects_total", count, tier="host")
