"""Which engines computed what a worker loads, by request: the objects' headers say so."""

from __future__ import annotations

import threading
from collections import Counter

from kvstrata.header import ObjectHeader
from kvstrata.producers import origin


class Origins:
    """Counts tokens of objects that are about to be copied; any thread may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[str, Counter[str]] = {}

    def note(self, request_id: str, header: ObjectHeader) -> None:
        """A request loads an object."""
        with self._lock:
            tokens = self._tokens.setdefault(request_id, Counter())
            tokens[origin(header)] += header.num_tokens

    def take(self) -> dict[str, Counter[str]]:
        """Tokens by engine, for each request, since the last call."""
        with self._lock:
            taken, self._tokens = self._tokens, {}
        return taken
