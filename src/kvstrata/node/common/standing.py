"""Whether a node of a fleet may use what it shares with others, and what others take from it."""

from __future__ import annotations

from collections.abc import Callable


class Standing:
    """A node's place in its fleet; on the node's loop.

    It is good as long as the node's registration is sure to last, by its own clock, and it has
    carried out all that the fleet was told.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.until = 0.0
        """When the registration may have run out."""
        self.caught_up = False
        self.exchanging = True
        """Whether all others have carried out what this node has, so that nothing of before comes
        back from one of them."""
        self._clock = clock

    @property
    def registered(self) -> bool:
        """Whether the others wait for this node."""
        return self._clock() < self.until

    def good(self) -> bool:
        """Whether shared tiers may be used, and others may read from this node."""
        return self.caught_up and self.registered

    def meets_peers(self) -> bool:
        """Whether this node may read from others."""
        return self.exchanging and self.good()


def alone() -> bool:
    """Of a node in no fleet: nobody tells it anything."""
    return True
