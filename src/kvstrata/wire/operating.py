"""Messages of an operator: what a node holds, and what is to become of it.

Part of ``docs/protocol.md``; `kvstrata.wire.protocol` encodes and decodes them with the others.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kvstrata.wire.message import Message, Numbers, Strings


class Lookup(Message, tag="lookup", frozen=True):
    id: int
    keys: bytes
    parts: Numbers
    orders: Strings = msgspec.field(default_factory=list)
    namespace: bytes = b""


class Found(Message, tag="found", frozen=True):
    id: int
    tiers: bytes


class Clear(Message, tag="clear", frozen=True):
    id: int
    keys: bytes | None = None
    tiers: Strings = msgspec.field(default_factory=list)


class Flush(Message, tag="flush", frozen=True):
    id: int


class Status(Message, tag="status", frozen=True):
    id: int


class State(Message, tag="state", frozen=True):
    id: int
    state: dict[str, Any]


class Metrics(Message, tag="metrics", frozen=True):
    id: int


class Value(Message, frozen=True):
    """A counter or a gauge; what it is called is in ``docs/metrics.md``."""

    name: str
    labels: dict[str, str]
    value: float


class Distribution(Message, frozen=True):
    """A histogram: how many values lie in each bucket alone, the last one without a bound."""

    name: str
    labels: dict[str, str]
    bounds: list[float]
    counts: list[int]
    sum: float


class Measured(Message, tag="measured", frozen=True):
    id: int
    values: list[Value]
    distributions: list[Distribution]


class Record(Message, tag="record", frozen=True):
    record: dict[str, Any]


class Records(Message, tag="records", frozen=True):
    id: int
    before: int = 0
    limit: int = 100


class RecordPage(Message, tag="record_page", frozen=True):
    id: int
    records: list[dict[str, Any]]
    next: int


class Watch(Message, tag="watch", frozen=True):
    id: int
    since: int = -1
    wait_s: float = 0.0


class Change(Message, frozen=True):
    tier: int
    what: str
    key: bytes = b""
    part: int = 0


class Watched(Message, tag="watched", frozen=True):
    id: int
    next: int
    lost: bool
    changes: Annotated[list[Change], msgspec.Meta(max_length=4096)]


Request = Lookup | Clear | Flush | Status | Metrics | Record | Records | Watch
Reply = Found | State | Measured | RecordPage | Watched
