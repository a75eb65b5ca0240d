"""What the namespaces are made of that engines use: kept for an operator who compares two nodes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from kvstrata.wire.namespaces import Described, described

MOST = 16


class Namespaces:
    """Those that engines began to use last."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Described] = OrderedDict()

    def note(self, record: dict[str, Any]) -> None:
        """Keep one that an engine handed in.

        Raises:
            UsageError: it is none.
        """
        told = described(record)
        digest = told.parts.digest()
        self._known[digest] = told
        self._known.move_to_end(digest)
        if len(self._known) > MOST:
            self._known.popitem(last=False)

    def described(self, digest: bytes) -> Described | None:
        """What one of them is made of; None: nobody has said."""
        return self._known.get(digest)

    def shown(self) -> list[dict[str, Any]]:
        """For a status, the latest last."""
        return [one.shown() for one in self._known.values()]
