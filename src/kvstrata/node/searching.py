"""One match under way: what it asks for, what was found of it, and what is decided about that."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from kvstrata.config.network import PeerConfig
from kvstrata.errors import UsageError
from kvstrata.heads import checked_heads
from kvstrata.keys import KEY_BYTES, OWNER_BYTES
from kvstrata.node.bounds import Bounds
from kvstrata.node.common.planner import Prefill
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.promotions import Load
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.leases import Lease
from kvstrata.node.slots.slot import Slot
from kvstrata.objects import stored_bytes
from kvstrata.observe.tracing import checked
from kvstrata.parts import MAX_PART
from kvstrata.transfer.tcp import Address
from kvstrata.wire import protocol as p

SLICE_KEYS = 4096
"""Keys that one slice takes out of the message."""


class Search:
    """One match under way.

    Raises:
        UsageError, Incompatible: the request makes no sense.
    """

    def __init__(self, client: Client, message: p.Match) -> None:
        self.begun = time.perf_counter()
        self.client = client
        self.id = message.id
        self.parts = tuple(checked_parts(message.parts))
        self.sizes = _sizes(message.lengths, message.parts)
        self.tail_sizes = _sizes(message.tail, message.parts)
        self.orders = frozenset(message.orders)
        self.preferred = tuple(dict.fromkeys(message.orders))
        self.namespace = checked_namespace(message.namespace)
        # The tiers that may be used, none: all; a peer that the request names is always one.
        named = [PeerConfig.name] if message.tiers and message.peer else []
        self.among = frozenset([*message.tiers, *named])
        self.heard = self.among  # those of them that may be loaded from by now
        if not (0 <= message.chunk_s < math.inf and 0 <= message.pair_s < math.inf):
            raise UsageError(f"{message.chunk_s} and {message.pair_s} s are no times of a chunk")
        if not 0 <= message.expected_s < math.inf:
            raise UsageError(f"{message.expected_s} s is no time to wait for a peer")
        if len(message.owner) != OWNER_BYTES:
            raise UsageError(f"an owner of {len(message.owner)} bytes, not {OWNER_BYTES}")
        self.owner = message.owner
        self.heads = checked_heads(message.heads)
        self.trace = checked(message.traceparent)
        self.keys: list[bytes] = []
        self.distinct: set[bytes] = set()
        self.prefill = Prefill(message.chunk_s, message.pair_s)
        self.tiers = bytearray()  # of the chunks that were found and leased so far
        self.coming: list[int] = []  # the bytes that each of them has to bring
        self.prepared: list[tuple[int, list[Slot]]] = []  # to be brought, once it is decided
        self.num_decided = 0  # chunks that were decided on
        self.num_found = 0  # chunks that were found, whatever was decided
        self.load_s = 0.0
        self.may_meet = message.meet and not message.needs and not message.expected_s
        self.meet = 0  # the chunk at which computing and loading are to meet; 0: they are not
        self.here = -1  # the longest boundary in host memory, where that was found out
        self.lease: Lease | None = None
        self.load: Load | None = None
        self.peer: Address | None = None  # that the request names
        self.peer_refused = ""
        self.expected_s = message.expected_s
        self.foreseeing = False  # what the peer is about to have counts, too
        self.ended = self.absent = False  # at its end, and because nobody has the next chunk
        self.cut = ""  # by which cap
        self.late: list[str] = []  # tiers that did not answer in time
        self.stop = 0  # in front of which chunk the search ends, once all keys are taken in
        self.bounds = Bounds.of(message, self.parts) if message.needs else None
        self._packed = message.keys
        self._num_keys = p.count(message.keys, 32)

    def may_use(self, tier: str) -> bool:
        """Whether a tier may be loaded from, as far as the request says."""
        return not self.among or tier in self.among

    def sizes_of(self, key: bytes) -> dict[int, int]:
        """Bytes of each of a chunk's objects when it is raw, as far as the reader says."""
        return self.tail_sizes if self.tail_sizes and key == self.keys[-1] else self.sizes

    def take_in(self) -> bool:
        """Take further keys out of the message; whether all of them are."""
        start = len(self.keys)
        self.keys += p.split(self._packed[32 * start : 32 * (start + SLICE_KEYS)], 32)
        self.distinct.update(self.keys[start:])
        if len(self.distinct) != len(self.keys):
            raise UsageError("no two chunks of a prompt have one key")
        self.stop = len(self.keys)
        return self.stop == self._num_keys


def checked_parts(parts: list[int]) -> list[int]:
    """Raises `UsageError` unless these can make up a chunk."""
    if not parts or len(set(parts)) != len(parts):
        raise UsageError("name the parts that make up a chunk, each once")
    if not all(0 <= part <= MAX_PART for part in parts):
        raise UsageError(f"not all of {parts} are parts: group << 16 | rank")
    return parts


def checked_namespace(namespace: bytes) -> bytes:
    """Raises `UsageError` for one that is neither given nor left out."""
    if len(namespace) not in (0, KEY_BYTES):
        raise UsageError(f"a namespace of {len(namespace)} bytes, not {KEY_BYTES}")
    return namespace


def check_tiers(tiers: Sequence[str], backings: Sequence[Backing]) -> None:
    """Raises `UsageError` for a name that none of the node's tiers has."""
    names = {"host", *(backing.name for backing in backings)}
    if unknown := set(tiers) - names:
        raise UsageError(f"no tier {unknown.pop()!r} here; there are {sorted(names)}")


def _sizes(lengths: list[int], parts: list[int]) -> dict[int, int]:
    """Bytes of each part's object when it is raw, as far as the reader says."""
    if lengths and len(lengths) != len(parts):
        raise UsageError(f"{len(parts)} parts, but the lengths of {len(lengths)}")
    if not all(0 < length < 1 << 48 for length in lengths):
        raise UsageError("a payload has at least one byte, and less than 2^48")
    return dict(zip(parts, map(stored_bytes, lengths), strict=False))
