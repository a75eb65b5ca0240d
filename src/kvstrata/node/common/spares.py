"""Objects that nobody has come to need: windows and states that lie before the boundaries in use.

A window or a state is needed only by boundaries close behind it, and a prompt is asked for again at
few of them: where it ended, and where others parted from it. What a match passed over on its way to
a later boundary is spare, unless one has needed it before.
"""

from __future__ import annotations

Name = tuple[bytes, int]


class Spares:
    """Of one tier, by chunk and part; lives on the node's loop."""

    def __init__(self) -> None:
        self._spare: dict[Name, None] = {}  # first passed over, first to go
        self._needed: set[Name] = set()

    def __len__(self) -> int:
        """How many objects anything is known of."""
        return len(self._spare) + len(self._needed)

    def __contains__(self, name: Name) -> bool:
        """Whether an object is spare."""
        return name in self._spare

    def need(self, name: Name) -> None:
        """A match has leased it: from now on it is as good as the rest of its chunk."""
        self._spare.pop(name, None)
        self._needed.add(name)

    def pass_over(self, name: Name) -> None:
        """A match has ended at a boundary that does not need it."""
        if name not in self._needed:
            self._spare.setdefault(name)

    def forget(self, name: Name) -> None:
        """It has left the tier."""
        self._spare.pop(name, None)
        self._needed.discard(name)

    def take(self) -> Name | None:
        """The next to go, which is not spare any more; None: there is none."""
        name = next(iter(self._spare), None)
        if name is not None:
            del self._spare[name]
        return name

    def names(self) -> set[Name]:
        """All that anything is known of."""
        return {*self._spare, *self._needed}

    def clear(self) -> None:
        """Nothing is there any more."""
        self._spare, self._needed = {}, set()
