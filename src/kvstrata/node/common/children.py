"""What begins like a prompt: chunks and tails by their first mark, so by their first 16 tokens.

A mark is a keyed hash of an object's parent and its tokens so far, so whoever has the first mark in
common has the parent in common, the model, the tenant and the salt. Nothing here does I/O, and
nothing here says whether the object is still anywhere.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

from kvstrata.header import MARK_BYTES, MARK_TOKENS
from kvstrata.tables import Queue, Table

MAX_CHILDREN = 1 << 17
"""Those that are remembered, the last ones that came or were of use: 50 MB, 17 million tokens."""
MAX_ALIKE = 64
"""Of one parent and the same first 16 tokens, the last ones that came or were of use."""

LET_GO = 16
"""Of what was cleared, with each that comes."""

_SIZES = struct.Struct("<HH")
_FIRST = slice(_SIZES.size, _SIZES.size + MARK_BYTES)


class Child(NamedTuple):
    """An object, and how much of it a prompt has, too.

    Args:
        key: of its chunk.
        num_tokens: that it has.
        good_tokens: of these the first ones, as far as marks tell: a multiple of 16.
        is_tail: whether it is shorter than a chunk.
    """

    key: bytes
    num_tokens: int
    good_tokens: int
    is_tail: bool

    @property
    def may_be_whole(self) -> bool:
        """Whether the prompt may have all of it: no mark says that it has not."""
        return self.good_tokens == self.num_tokens // MARK_TOKENS * MARK_TOKENS


class Children:
    """All that is remembered.

    Args:
        most: how many.
    """

    def __init__(self, most: int = MAX_CHILDREN) -> None:
        self._most = most
        # Tokens, tokens of a whole chunk, marks: one bytes object costs a third of a tuple.
        self._known: Queue[bytes] = Queue()
        self._alike: Table[bytes | tuple[bytes, ...]] = Table()  # the one key, or several
        # What was cleared: to let go of all of it at once would take long.
        self._leaving: deque[Iterator[object]] = deque()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def is_full(self) -> bool:
        """Whether a new one would be remembered in another's place."""
        return len(self._known) >= self._most

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def enter(self, key: bytes, num_tokens: int, chunk_tokens: int, marks: bytes) -> None:
        """Remember an object; one without marks is nothing that could be found."""
        if self._leaving and not sum(1 for _ in islice(self._leaving[0], LET_GO)):
            self._leaving.popleft()
        entry = _SIZES.pack(num_tokens, chunk_tokens) + marks
        known = self._known.get(key)
        if not marks or known == entry:
            return
        if known is not None:
            self.leave(key)
        self._known[key] = entry
        first = marks[:MARK_BYTES]
        oldest = b""
        if first in self._alike:
            alike = self._alike[first] = (*self._keys(first), key)
            oldest = alike[0] if len(alike) > MAX_ALIKE else b""
        else:
            self._alike[first] = key
        if oldest:
            self.leave(oldest)
        elif len(self._known) > self._most:
            self.leave(next(iter(self._known)))

    def leave(self, key: bytes) -> None:
        """Remember it no more, if it was."""
        known = self._known.pop(key)
        if known is not None:
            first = known[_FIRST]
            alike = tuple(one for one in self._keys(first) if one != key)
            if alike:
                self._alike[first] = alike[0] if len(alike) == 1 else alike
            else:
                del self._alike[first]

    def use(self, key: bytes) -> None:
        """It was of use: others are forgotten before it."""
        known = self._known.get(key)
        if known is not None:
            self.leave(key)
            num_tokens, chunk_tokens = _SIZES.unpack_from(known)
            self.enter(key, num_tokens, chunk_tokens, known[_SIZES.size :])

    def clear(self) -> None:
        """Remember nothing any more."""
        self._leaving.append(chain(self._known.drain(), self._alike.drain()))
        self._known, self._alike = Queue(), Table()

    def alike(self, marks: bytes) -> list[Child]:
        """What begins as a prompt goes on, the most of it first, the latest first of equals.

        Args:
            marks: of the prompt's next tokens behind the parent.
        """
        found = []
        for key in reversed(self._keys(marks[:MARK_BYTES])):
            known = self._known[key]
            num_tokens, chunk_tokens = _SIZES.unpack_from(known)
            good = MARK_TOKENS * _in_common(known[_SIZES.size :], marks)
            found.append(Child(key, num_tokens, good, num_tokens < chunk_tokens))
        found.sort(key=lambda child: (-child.good_tokens, not child.may_be_whole))
        return found

    def tails_begun(self, key: bytes) -> list[bytes]:
        """Tails that an object begins with, as far as marks tell, but for less than 16 tokens."""
        known = self._known.get(key)
        if known is None or isinstance(self._alike[known[_FIRST]], bytes):
            return []
        num_tokens, _ = _SIZES.unpack_from(known)
        return [
            child.key
            for child in self.alike(known[_SIZES.size :])
            if child.is_tail and child.may_be_whole and child.num_tokens < num_tokens
        ]

    def check_integrity(self) -> None:
        """Raise AssertionError unless both tables say the same, within their bounds."""
        assert len(self._known) <= self._most
        listed = [key for first in self._alike for key in self._keys(first)]
        assert len(listed) == len(set(listed))
        assert set(listed) == set(self._known)
        for first in self._alike:
            assert 0 < len(self._keys(first)) <= MAX_ALIKE
            assert all(self._known[key][_SIZES.size :].startswith(first)
                       for key in self._keys(first))  # fmt: skip

    def _keys(self, first: bytes) -> tuple[bytes, ...]:
        alike = (self._alike.get(first) if first else None) or ()
        return (alike,) if isinstance(alike, bytes) else alike


def _in_common(these: bytes, those: bytes) -> int:
    """How many leading marks are the same."""
    end = min(len(these), len(those))
    if these[:end] == those[:end]:
        return end // MARK_BYTES
    return next(
        place
        for place in range(end // MARK_BYTES)
        if these[place * MARK_BYTES :][:MARK_BYTES] != those[place * MARK_BYTES :][:MARK_BYTES]
    )
