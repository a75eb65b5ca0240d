"""Who met the same tokens under another namespace: so a miss can say that they are stored there.

Of the prompts that were asked for last their heads are kept (`kvstrata.heads`), and under which
first key they are stored. Whose they are is kept beside, for nobody may learn of another's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from kvstrata.heads import HEAD_BYTES

MOST = 1 << 13
"""First chunks that are remembered: 8 MiB at most."""
MOST_ALIKE = 16
"""Of one owner, and of all, that begin alike."""


class Asked(NamedTuple):
    """One prompt's beginning, as it was asked for.

    Args:
        key: of its first chunk.
        namespace: the digest of its own.
        owner: whose it is.
        heads: 16 bytes each, first the one of as many tokens as its chunk has.
    """

    key: bytes
    namespace: bytes
    owner: bytes
    heads: bytes


class Kin:
    """The beginnings that were met last."""

    def __init__(self) -> None:
        self._asked: OrderedDict[bytes, Asked] = OrderedDict()  # by key
        # Keys of those that begin alike, the latest last: by owner and head, and by head alone.
        self._alike: dict[bytes, dict[bytes, None]] = {}

    def note(self, asked: Asked) -> None:
        """Remember a beginning that was asked for."""
        before = self._asked.pop(asked.key, None)
        if before is not None:
            self._leave(before)
        self._asked[asked.key] = asked
        for group in self._groups(asked):
            keys = self._alike.setdefault(group, {})
            keys[asked.key] = None
            if len(keys) > MOST_ALIKE:
                del keys[next(iter(keys))]
        if len(self._asked) > MOST:
            _, oldest = self._asked.popitem(last=False)
            self._leave(oldest)

    def known(self, key: bytes) -> Asked | None:
        """What was asked for under this first key."""
        return self._asked.get(key)

    def others(self, asked: Asked, *, of_all: bool) -> Iterator[Asked]:
        """Who began with the same tokens under another key, the latest first.

        Args:
            asked: whose relatives.
            of_all: those of other owners, too.
        """
        heads = asked.heads
        for start in range(0, len(heads), HEAD_BYTES):
            head = heads[start : start + HEAD_BYTES]
            for key in reversed(self._alike.get(head if of_all else asked.owner + head, {})):
                if key != asked.key and key in self._asked:
                    yield self._asked[key]

    def _leave(self, asked: Asked) -> None:
        """Let a beginning belong to no group any more."""
        for group in self._groups(asked):
            alike = self._alike.get(group, {})
            alike.pop(asked.key, None)
            if not alike:
                self._alike.pop(group, None)

    @staticmethod
    def _groups(asked: Asked) -> tuple[bytes, bytes]:
        head = asked.heads[:HEAD_BYTES]
        return head, asked.owner + head
