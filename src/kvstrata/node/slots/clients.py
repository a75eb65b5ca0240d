"""What one connection holds on the node."""

from __future__ import annotations


class Client:
    """One connection's leases and reservations, by their numbers, and the bytes they hold.

    They end when the client says so, or when its process is dead; a connection that ended
    without a word leaves them in force, since a copy may still be running. Who has ``ended`` is
    granted nothing any more.
    """

    __slots__ = ("ended", "leased_bytes", "leases", "name", "reservations", "reserved_bytes")

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended = False
        self.leases: set[int] = set()
        self.reservations: set[int] = set()
        self.leased_bytes = 0
        self.reserved_bytes = 0

    @property
    def holds_something(self) -> bool:
        """Whether its end would free anything."""
        return bool(self.leases or self.reservations)
