"""What became of the last requests, as engines tell: kept for the operator, and counted."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import msgspec

from kvstrata.errors import UsageError
from kvstrata.node.namespaces import Namespaces
from kvstrata.observe.counters import Counters

NUM_RECORDS = 1024
MAX_RECORD_BYTES = 8192
MAX_OUTCOMES = 32
NUM_SHOWN = 32
_LABEL = re.compile(r"[a-z0-9_ -]{1,32}")


class Records:
    """Those of the last requests, and what the namespaces are made of that they are in.

    Args:
        counters: the node's.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._requests: deque[dict[str, Any]] = deque(maxlen=NUM_RECORDS)
        self._namespaces = Namespaces()
        self._outcomes: set[str] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def note(self, record: dict[str, Any]) -> None:
        """Keep one request's record, or what a namespace is made of.

        Raises:
            UsageError: it is too large, or none.
        """
        try:
            nbytes = len(msgspec.msgpack.encode(record))
        except RecursionError as error:
            raise UsageError("a record is nested too deep") from error
        if nbytes > MAX_RECORD_BYTES:
            raise UsageError(f"a record of {nbytes} bytes; at most {MAX_RECORD_BYTES}")
        if "namespace" in record:
            return self._namespaces.note(record)
        self._requests.append(record)
        outcome = str(record.get("outcome", ""))
        if len(self._outcomes) < MAX_OUTCOMES and _LABEL.fullmatch(outcome):
            self._outcomes.add(outcome)
        label = outcome if outcome in self._outcomes else "other"
        self._counters.add("requests_total", outcome=label)

    def shown(self) -> dict[str, Any]:
        """For a status, the latest last."""
        return {
            "namespaces": self._namespaces.shown(),
            "requests": list(self._requests)[-NUM_SHOWN:],
        }
