"""What one connection holds on the node, and what all connections of its process hold."""

from __future__ import annotations


class Holder:
    """A process, and what its connections hold together, in bytes and watches: caps are for these.

    A process that could have the caps anew with each connection would have none, since what a
    connection that was dropped still holds stays in force. A cap may be lowered below what is held
    already: what counts is the one that was in force when something was granted last.
    """

    __slots__ = (
        "leased_bytes",
        "leased_cap_bytes",
        "num_watches",
        "reserved_bytes",
        "reserved_cap_bytes",
    )

    def __init__(self) -> None:
        self.leased_bytes = self.leased_cap_bytes = 0
        self.reserved_bytes = self.reserved_cap_bytes = 0
        self.num_watches = 0


class Client:
    """One connection's leases and reservations, by their numbers.

    They end when the client says so, or when its process is dead; a connection that ended
    without a word leaves them in force, since a copy may still be running. Who has ``ended`` is
    granted nothing any more.

    Args:
        name: for the log.
        holder: its process; None: one with no other connection.
    """

    __slots__ = ("ended", "holder", "leases", "name", "reservations")

    def __init__(self, name: str, holder: Holder | None = None) -> None:
        self.name = name
        self.holder = holder or Holder()
        self.ended = False
        self.leases: set[int] = set()
        self.reservations: set[int] = set()

    @property
    def leased_bytes(self) -> int:
        """What its process has leased."""
        return self.holder.leased_bytes

    @property
    def reserved_bytes(self) -> int:
        """What its process has reserved."""
        return self.holder.reserved_bytes

    @property
    def holds_something(self) -> bool:
        """Whether its end would free anything."""
        return bool(self.leases or self.reservations)
