"""What one attached model's calls came to, in numbers; in whichever thread."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any


class Tally:
    """Counts of calls, tokens, stores and errors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._named: dict[str, Counter[str]] = {
            name: Counter() for name in ("bypassed", "unselected", "errors")
        }

    def add(self, **counts: int) -> None:
        """Add to counters by their names."""
        with self._lock:
            self._counts.update(counts)

    def note(self, what: str, name: str) -> None:
        """One more of a named kind: ``bypassed``, ``unselected`` or ``errors``."""
        with self._lock:
            self._named[what][name] += 1

    def take(self) -> dict[str, Any]:
        """All of them so far."""
        names = ("calls", "prompt_tokens", "loaded_tokens", "stored_chunks", "skipped_stores",
                 "selected_calls", "found_selections", "stored_selections")  # fmt: skip
        with self._lock:
            counts = {name: self._counts[name] for name in names}
            return {**counts, **{what: dict(names) for what, names in self._named.items()}}
