"""Whose the chunks of one tier are: bytes of each owner, and what an owner may have there.

A chunk of the index has one small object that says whose it is, which all chunks of that owner and
namespace share. There are never more of these than chunks; one that no chunk has is forgotten.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from kvstrata.policies.base import Policy
from kvstrata.tiers.marks import UNKNOWN, Mark, Whose

NUM_SHOWN = 32
"""Owners that a status names, those with the most bytes; the others are one sum."""


class Account:
    """What one owner has in one tier.

    ``nbytes`` are in the index, ``filling_bytes`` are on their way into it. With a quota the two
    never exceed ``ceiling_bytes``: the quota, or what there was when it was set lower, as far as
    that has not gone since. ``policy`` orders the owner's chunks, where there is a quota;
    ``meanwhile`` has what was used or came in while that order is being made, last use last.
    """

    __slots__ = ("ceiling_bytes", "filling_bytes", "meanwhile", "nbytes", "num_chunks", "owner",
                 "policy", "quota_bytes")  # fmt: skip

    def __init__(self, owner: bytes) -> None:
        self.owner = owner
        self.nbytes = self.filling_bytes = self.num_chunks = 0
        self.quota_bytes: int | None = None
        self.ceiling_bytes = 0
        self.policy: Policy | None = None
        self.meanwhile: OrderedDict[bytes, None] | None = None

    @property
    def used_bytes(self) -> int:
        """What counts against the quota."""
        return self.nbytes + self.filling_bytes

    def lacks(self, nbytes: int) -> bool:
        """Whether so many bytes more would be too many."""
        return self.quota_bytes is not None and self.used_bytes + nbytes > self.quota_bytes

    def used(self, keys: Iterable[bytes]) -> None:
        """These chunks of the owner's were used, or came in, in this order."""
        if self.meanwhile is not None:
            for key in keys:
                self.meanwhile[key] = None
                self.meanwhile.move_to_end(key)

    def lowered(self) -> None:
        """Something has gone: what is above the quota does not come back."""
        if self.quota_bytes is not None:
            self.ceiling_bytes = max(self.quota_bytes, min(self.ceiling_bytes, self.used_bytes))


class Tag:
    """Whose a chunk is, and what it belongs to."""

    __slots__ = ("account", "namespace", "num_chunks")

    def __init__(self, account: Account, namespace: bytes) -> None:
        self.account = account
        self.namespace = namespace
        self.num_chunks = 0

    @property
    def whose(self) -> Whose:
        """The same as plain values."""
        return Whose(self.account.owner, self.namespace)


class Owners:
    """The owners of one tier's chunks."""

    def __init__(self) -> None:
        self.num_quotas = 0
        self._accounts: dict[bytes, Account] = {}
        self._tags: dict[Whose, Tag] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def account(self, owner: bytes) -> Account:
        """What an owner has; to be `settle`d by whoever asks and enters nothing."""
        account = self._accounts.get(owner)
        if account is None:
            account = self._accounts[owner] = Account(owner)
        return account

    def tag(self, whose: Whose) -> Tag:
        """What a chunk of theirs is marked with."""
        tag = self._tags.get(whose)
        if tag is None:
            tag = self._tags[whose] = Tag(self.account(whose.owner), whose.namespace)
        return tag

    def fill(self, account: Account, nbytes: int) -> None:
        """So many bytes of an owner are on their way; negative: they have arrived, or will not."""
        account.filling_bytes += nbytes
        if nbytes > 0:  # the owner's last chunk may have gone to make room for this
            assert self._accounts.setdefault(account.owner, account) is account
        assert account.filling_bytes >= 0
        if nbytes < 0:
            account.lowered()
            self.settle(account)

    def enter(self, tag: Tag) -> None:
        """A chunk is theirs."""
        tag.num_chunks += 1
        tag.account.num_chunks += 1

    def leave(self, tag: Tag) -> None:
        """One is not any more."""
        tag.num_chunks -= 1
        tag.account.num_chunks -= 1
        if not tag.num_chunks:
            self._tags.pop(tag.whose, None)
            self.settle(tag.account)

    def may_have(self, mark: Mark) -> bool:
        """Whether some chunk is, or may be, what a mark is about."""
        return any(whose == UNKNOWN or mark.fits(whose) for whose in self._tags)

    def settle(self, account: Account) -> None:
        """Forget an owner of whom nothing is known."""
        if not (account.num_chunks or account.filling_bytes) and account.quota_bytes is None:
            self._accounts.pop(account.owner, None)

    def clear(self) -> None:
        """All chunks have gone."""
        self._tags = {}
        for account in list(self._accounts.values()):
            account.nbytes = account.num_chunks = 0
            account.lowered()
            if account.policy is not None:
                account.policy = account.policy.emptied()
            self.settle(account)

    def shown(self) -> list[dict[str, Any]]:
        """For a status, who has the most first; what nobody is known for has an empty owner."""
        most = heapq.nlargest(NUM_SHOWN, self, key=lambda account: account.nbytes)
        shown: list[dict[str, Any]] = [
            {
                "owner": account.owner.hex(),
                "bytes": account.nbytes,
                "num_chunks": account.num_chunks,
                "quota_bytes": account.quota_bytes,
            }
            for account in most
        ]
        if len(self) > len(most):
            named = {account.owner for account in most}
            rest = [account for account in self if account.owner not in named]
            shown.append({
                "owner": "other",
                "bytes": sum(account.nbytes for account in rest),
                "num_chunks": sum(account.num_chunks for account in rest),
                "quota_bytes": None,
            })  # fmt: skip
        return shown
