"""Messages of an operator: what a node holds, and what is to become of it.

Part of ``docs/protocol.md``; `kvstrata.wire.protocol` encodes and decodes them with the others.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kvstrata.header import NOBODY
from kvstrata.observe.reasons import Reason
from kvstrata.wire.message import Message, Numbers, Strings

MAX_REASONS = 32
"""That one answer names: those of longer prompts are told of their beginning."""
Reasons = Annotated[list[Reason], msgspec.Meta(max_length=MAX_REASONS)]


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
    owner: bytes = b""
    namespace: bytes = b""
    before_ns: int = 0


class Pin(Message, tag="pin", frozen=True):
    id: int
    keys: bytes
    owner: bytes
    name: str
    ttl_s: float


class Pinned(Message, tag="pinned", frozen=True):
    id: int
    num_chunks: int
    num_kept: int
    tiers: dict[str, int]
    notes: dict[str, str]


class Unpin(Message, tag="unpin", frozen=True):
    id: int
    owner: bytes
    name: str


class Pins(Message, tag="pins", frozen=True):
    id: int
    after: bytes = b""
    limit: int = 256


class PinState(Message, frozen=True):
    """One pin: whose, its name, its chunks, how many of them are kept, until when (Unix s)."""

    owner: bytes
    name: str
    num_chunks: int
    num_kept: int
    until_s: float


class PinPage(Message, tag="pin_page", frozen=True):
    id: int
    pins: list[PinState]
    after: bytes


class Quota(Message, tag="quota", frozen=True):
    id: int
    owner: bytes
    tier: str
    nbytes: int | None


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


class Jobs(Message, tag="jobs", frozen=True):
    id: int
    after: int = 0
    limit: int = 100


class JobState(Message, frozen=True):
    """One job as `JobPage` tells it; times in Unix seconds, ``ended`` 0 while it runs."""

    id: int
    kind: str
    about: str
    state: str
    total: int
    done: int
    nbytes: int
    failed: int
    troubles: list[str]
    note: str
    began: float
    ended: float


class JobPage(Message, tag="job_page", frozen=True):
    id: int
    jobs: list[JobState]
    next: int


class Cancel(Message, tag="cancel", frozen=True):
    id: int
    job: int


class Started(Message, tag="started", frozen=True):
    id: int
    job: int
    again: bool


class Prefetch(Message, tag="prefetch", frozen=True):
    id: int
    keys: bytes
    parts: Numbers = msgspec.field(default_factory=list)
    orders: Strings = msgspec.field(default_factory=list)
    lengths: Numbers = msgspec.field(default_factory=list)
    namespace: bytes = b""
    owner: bytes = NOBODY


class Copy(Message, tag="copy", frozen=True):
    id: int
    keys: bytes
    source: str
    target: str
    parts: Numbers = msgspec.field(default_factory=list)
    orders: Strings = msgspec.field(default_factory=list)
    namespace: bytes = b""


class Move(Copy, tag="move", frozen=True):
    pass


class Send(Message, tag="send", frozen=True):
    id: int
    keys: bytes
    peer: str
    parts: Numbers = msgspec.field(default_factory=list)
    orders: Strings = msgspec.field(default_factory=list)
    lengths: Numbers = msgspec.field(default_factory=list)
    namespace: bytes = b""


class Transcode(Message, tag="transcode", frozen=True):
    id: int
    tier: str
    codec: str = ""
    keys: bytes | None = None
    parts: Numbers = msgspec.field(default_factory=list)
    orders: Strings = msgspec.field(default_factory=list)
    namespace: bytes = b""


class Scrub(Message, tag="scrub", frozen=True):
    id: int
    tier: str


class Inspect(Message, tag="inspect", frozen=True):
    id: int
    tier: str
    key: bytes
    part: int = 0
    orders: Strings = msgspec.field(default_factory=list)
    namespace: bytes = b""


class Inspected(Message, tag="inspected", frozen=True):
    id: int
    nbytes: int
    problem: str
    header: dict[str, Any]


class List(Message, tag="list", frozen=True):
    id: int
    tier: str = ""
    after: bytes = b""
    limit: int = 100


class Chunk(Message, frozen=True):
    """One chunk as `Listed` tells it; what the node does not know is empty or 0."""

    key: bytes
    tiers: dict[str, int]
    parent: bytes
    start: int
    num_tokens: int
    namespace: bytes
    owner: bytes
    used: float


class Listed(Message, tag="listed", frozen=True):
    id: int
    chunks: list[Chunk]
    next: bytes


class Drain(Message, tag="drain", frozen=True):
    id: int
    end: bool = False


class Undrain(Message, tag="undrain", frozen=True):
    id: int


class Reload(Message, tag="reload", frozen=True):
    id: int
    config: dict[str, Any]


class Reloaded(Message, tag="reloaded", frozen=True):
    id: int
    changed: list[str]
    engines: list[str]


class Explain(Message, tag="explain", frozen=True):
    id: int
    request: str = ""
    keys: bytes = b""
    namespace: bytes = b""
    owner: bytes = NOBODY
    heads: bytes = b""
    across: bool = False


class Explained(Message, tag="explained", frozen=True):
    id: int
    record: dict[str, Any]
    tiers: bytes
    reasons: Reasons


Working = Prefetch | Copy | Move | Send | Transcode | Scrub | Drain
"""What is answered with the job that does it."""
Request = (
    Lookup | Clear | Pin | Unpin | Pins | Quota | Flush | Status | Metrics | Record | Records
    | Watch
    | Jobs | Cancel | Working | Inspect | List | Undrain | Reload | Explain
)  # fmt: skip
Reply = (
    Found | Pinned | PinPage | State | Measured | RecordPage | Watched
    | JobPage | Started | Inspected | Listed | Reloaded | Explained
)  # fmt: skip
