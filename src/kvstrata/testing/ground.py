"""What tiers under test stand on: a folder, or a real server that is killed, paused or filled."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Ground(ABC):
    """What the tiers under test stand on, such as a folder or a server."""

    @abstractmethod
    def close(self) -> None:
        """End it, and remove what it left. Repeatable."""


class Server(Ground):
    """A real server under test: started when made, on loopback, with its own port and folder."""

    @abstractmethod
    def kill(self) -> None:
        """End it as kill -9 does. Repeatable."""

    @abstractmethod
    def restart(self) -> None:
        """Start it again, at the same address; returns when it answers."""

    @abstractmethod
    def pause(self) -> None:
        """Let it hang: connections stand, nothing is answered (SIGSTOP)."""

    @abstractmethod
    def resume(self) -> None:
        """Let it go on."""

    def fill(self) -> bool:
        """Let it have no room for another object; False where that cannot be had here."""
        return False

    def make_room(self) -> None:
        """Let it have room again, where `fill` took it."""
        raise NotImplementedError
