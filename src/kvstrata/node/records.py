"""What became of the last requests, as engines tell: kept for the operator, and counted."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection
from typing import Any

import msgspec

from kvstrata.errors import UsageError
from kvstrata.node.namespaces import Namespaces
from kvstrata.node.operating.requests import RequestCounts
from kvstrata.node.slots.clients import Client
from kvstrata.observe.counters import Counters
from kvstrata.wire import protocol as p
from kvstrata.wire.namespaces import Described

NUM_RECORDS = 1024
MAX_RECORD_BYTES = 8192
MAX_DEPTH = 32
"""Of what is nested in a record."""
MAX_OUTCOMES = 32
NUM_SHOWN = 32
_LABEL = re.compile(r"[a-z0-9_ -]{1,32}")


class Records:
    """Those of the last requests, and what the namespaces are made of that they are in.

    Args:
        counters: the node's.
        tiers: names of the node's tiers, host memory among them.
    """

    def __init__(self, counters: Counters, tiers: Collection[str]) -> None:
        self._counters = counters
        self._counts = RequestCounts(counters, tiers)
        self._requests: deque[dict[str, Any]] = deque(maxlen=NUM_RECORDS)
        self._namespaces = Namespaces()
        self._outcomes: set[str] = set()
        self._num_ever = 0

    def __len__(self) -> int:
        return len(self._requests)

    def note(self, record: dict[str, Any]) -> None:
        """Keep one request's record, or what a namespace is made of.

        Raises:
            UsageError: it is too large, or not of JSON's values.
        """
        try:
            nbytes = len(msgspec.msgpack.encode(record))
        except RecursionError as error:
            raise UsageError("a record is nested too deep") from error
        if nbytes > MAX_RECORD_BYTES:
            raise UsageError(f"a record of {nbytes} bytes; at most {MAX_RECORD_BYTES}")
        if "namespace" in record:
            return self._namespaces.note(record)
        _check_json(record)
        self._requests.append(record)
        self._num_ever += 1
        outcome = str(record.get("outcome", ""))
        if len(self._outcomes) < MAX_OUTCOMES and _LABEL.fullmatch(outcome):
            self._outcomes.add(outcome)
        label = outcome if outcome in self._outcomes else "other"
        self._counters.add("requests_total", outcome=label)
        self._counts.note(record)

    def answer(self, client: Client, message: p.Records) -> p.RecordPage:
        """A page for an operator, the latest first."""
        return p.RecordPage(message.id, *self.page(message.before, message.limit))

    def page(self, before: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Those of before a number, the latest first, and before which to go on; 0: it was the end.

        Args:
            before: of the last one that is known; 0: from the latest on. Each has a ``number``,
                counted since the node started.
            limit: how many at most.

        Raises:
            UsageError: a negative number, or a limit that no page has.
        """
        if before < 0 or not 0 < limit <= p.MAX_PAGE:
            raise UsageError(f"{limit} records before {before}; a page has 1 to {p.MAX_PAGE}")
        oldest = self._num_ever - len(self._requests) + 1
        end = min(before or self._num_ever + 1, self._num_ever + 1)
        numbers = range(end - 1, max(oldest, end - limit) - 1, -1)
        records = [{**self._requests[number - oldest], "number": number} for number in numbers]
        return records, numbers[-1] if numbers and numbers[-1] > oldest else 0

    def described(self, digest: bytes) -> Described | None:
        """What a namespace is made of; None: nobody has said."""
        return self._namespaces.described(digest)

    def find(self, request: str) -> dict[str, Any] | None:
        """The last record of a request, by its id or else by a part of that."""
        named = [(str(one.get("request", "")), one) for one in reversed(self._requests)]
        exactly = [one for name, one in named if name == request]
        return next(iter(exactly), next((one for name, one in named if request in name), None))

    def shown(self) -> dict[str, Any]:
        """For a status, the latest last."""
        return {
            "namespaces": self._namespaces.shown(),
            "requests": list(self._requests)[-NUM_SHOWN:],
        }


def _check_json(record: dict[str, Any]) -> None:
    """Raises `UsageError` for what JSON has no word for: MessagePack has more."""
    values: list[Any] = [record]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in values:
            if isinstance(value, dict):
                if any(not isinstance(name, str) for name in value):
                    raise UsageError("a record has text for names, and nothing else")
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif not isinstance(value, str | int | float | None):
                raise UsageError(f"a record is JSON, which has no {type(value).__name__}")
        if not inner:
            return
        values = inner
    raise UsageError(f"a record is nested too deep; {MAX_DEPTH} levels at most")
