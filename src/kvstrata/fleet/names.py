"""Under which keys the registry keeps what. All in one hash slot, so that one script sees all."""

from __future__ import annotations


class Names:
    """Keys of one fleet.

    Args:
        prefix: as configured.
    """

    def __init__(self, prefix: str) -> None:
        self._root = f"{{{prefix}:fleet}}"
        self.names = self._key("names")
        """Sorted set: every node that was ever here, by when it renewed its registration last."""
        self.generation = self._key("generation")
        """What tells this registry from one that has lost its memory."""
        self.commands = self._key("commands")
        """Stream of commands; the first half of an entry's id is the command's number."""
        self.seen = self._key("seen")
        """Hash: number of the last command that a node has carried out, by its name."""
        self.cleared = self._key("cleared")
        """Hash: which shared stores a command has cleared already."""

    def _key(self, *words: object) -> bytes:
        return ":".join([self._root, *map(str, words)]).encode()

    def member(self, name: str) -> bytes:
        """A node's registration, which runs out."""
        return self._key("member", name)

    def events(self, name: str) -> bytes:
        """A node's stream of events."""
        return self._key("events", name)

    def answers(self, number: int) -> bytes:
        """Hash: what each node answered to a command, by its name."""
        return self._key("answers", number)

    def held(self, name: str, boot: int, tier: str) -> bytes:
        """Set: the chunks in a tier of a node."""
        return self._key("held", name, boot, tier)
