"""vLLM's own KV events of what the node has: for routers that read them from the engine.

The node knows keys alone, and they need tokens and vLLM's block hashes; so the connector remembers
these of the chunks that it stored or found, watches the node, and says which of them came into a
medium or left it. vLLM publishes that with its own events, after the engine's next step.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash, resolve_block_hashes
from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind

from kvstrata.config import Config
from kvstrata.connectors.vllm.groups import Groups
from kvstrata.connectors.vllm.requests import RequestState
from kvstrata.errors import KVStrataError
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient
from kvstrata.wire.launch import connect

logger = logging.getLogger(__name__)

MEDIA: Mapping[str, str] = {"host": MEDIUM_CPU, "memory": MEDIUM_CPU, "disk": MEDIUM_STORAGE}
"""Of the tiers that are the node's own. What lies in a store that a fleet shares is everybody's."""
OWNERSHIP, LOCALITY = "kvstrata", "LOCAL"
MOST_CHUNKS = 1 << 15
"""That are remembered, at some 1.3 KB; of the one that is forgotten it is said that it is gone."""
MOST_EVENTS = 1 << 15
"""That wait for the engine's next step."""
WATCH_S, ANSWER_S, RETRY_S = 1.0, 10.0, 0.5


class _Chunk:
    """What is said of one chunk, and where its objects are: bits of its parts, by tier."""

    __slots__ = ("hashes", "held", "lora", "media", "number", "parent", "tokens")

    def __init__(
        self,
        number: int,
        hashes: list[Any],
        parent: Any,
        tokens: array[int],
        lora: tuple[int, str] | None,
    ) -> None:
        self.number = number
        self.hashes = hashes
        self.parent = parent
        self.tokens = tokens
        self.lora = lora
        self.held: dict[str, int] = {}
        self.media: set[str] = set()


class Shape(NamedTuple):
    """How vLLM cuts its cache.

    Args:
        chunk_tokens: of a chunk.
        block_tokens: of a block.
        hash_tokens: that each of a request's hashes is of.
        kind: of the attention, in vLLM's words.
        group: number of the layer group that is told of.
    """

    chunk_tokens: int
    block_tokens: int
    hash_tokens: int
    kind: str
    group: int = 0


class Events:
    """Turns what becomes of chunks into vLLM's events; thread-safe.

    Args:
        shape: how vLLM cuts its cache.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._parts: dict[int, int] = {0: 1}  # a part's bit
        self._chunks: OrderedDict[bytes, _Chunk] = OrderedDict()
        # Each with its chunk's number in its prompt.
        self._out: list[tuple[int, BlockStored | BlockRemoved]] = []
        self._lock = threading.Lock()

    @property
    def group(self) -> int:
        """The layer group that is told of."""
        return self._shape.group

    def learn(self, parts: Iterable[int]) -> None:
        """These objects make up a chunk of the group."""
        with self._lock:
            self._parts = {part: 1 << number for number, part in enumerate(parts)}

    def note(self, state: RequestState, first: int, done: int) -> None:
        """A request's chunks of these numbers are about to be stored, or were found."""
        request, shape = state.request, self._shape
        if request.cache_salt:
            return  # whoever reads the events is not to learn what it asks
        per_chunk = shape.chunk_tokens // shape.block_tokens
        hashes = resolve_block_hashes(request.block_hashes, shape.hash_tokens, shape.block_tokens)
        lora = request.lora_request
        with self._lock:
            for number in range(first, min(done, len(state.keys))):
                key = state.keys[number]
                if key in self._chunks or (number + 1) * per_chunk > len(hashes):
                    continue
                start = number * shape.chunk_tokens
                begin = number * per_chunk
                tokens = request.all_token_ids[start : start + shape.chunk_tokens]
                self._chunks[key] = _Chunk(
                    number,
                    [maybe_convert_block_hash(hashes[begin + i]) for i in range(per_chunk)],
                    maybe_convert_block_hash(hashes[begin - 1]) if begin else None,
                    array("q", tokens),
                    None if lora is None else (lora.adapter_id, lora.name),
                )
            while len(self._chunks) > MOST_CHUNKS:
                _, oldest = self._chunks.popitem(last=False)
                oldest.held.clear()
                self._tell(oldest)

    def found(self, state: RequestState, tiers: Sequence[str]) -> None:
        """A request's leading chunks were found in these tiers."""
        count = next((i for i, tier in enumerate(tiers) if tier not in MEDIA), len(tiers))
        self.note(state, 0, count)
        self.see(state.keys[:count], tiers[:count])

    def hear(self, tier: str, what: str, key: bytes, part: int) -> None:
        """The node says what became of an object."""
        if tier not in MEDIA:
            return
        with self._lock:
            if what == "emptied":
                for chunk in self._chunks.values():
                    chunk.held.pop(tier, None)
                    self._tell(chunk)
                return
            known, bit = self._chunks.get(key), self._parts.get(part)
            if known is None or bit is None:
                return
            held = known.held.get(tier, 0)
            known.held[tier] = held | bit if what == "entered" else held & ~bit
            self._tell(known)

    def lose(self) -> None:
        """Nobody knows what the node has now: nothing is said to be there."""
        with self._lock:
            for chunk in self._chunks.values():
                chunk.held.clear()
                self._tell(chunk)

    def forget_all(self) -> None:
        """None of it will be found by this engine again."""
        self.lose()
        with self._lock:
            self._chunks.clear()

    def known(self) -> list[bytes]:
        """Keys of the chunks that something can be said of."""
        with self._lock:
            return list(self._chunks)

    @property
    def parts(self) -> list[int]:
        """What makes up a chunk."""
        with self._lock:
            return list(self._parts)

    def see(self, keys: Sequence[bytes], tiers: Sequence[str]) -> None:
        """These chunks are whole in these tiers."""
        with self._lock:
            for key, tier in zip(keys, tiers, strict=True):
                chunk = self._chunks.get(key)
                if chunk is not None and tier in MEDIA:
                    chunk.held[tier] = (1 << len(self._parts)) - 1
                    self._tell(chunk)

    def take(self) -> list[BlockStored | BlockRemoved]:
        """What is to be published, in order; a prompt's head before its tail.

        A node publishes tails first, and some routers know nothing of a block whose parent they do
        not know.
        """
        with self._lock:
            out, self._out = self._out, []
        told: list[BlockStored | BlockRemoved] = []
        for _, alike in groupby(out, lambda one: (type(one[1]), one[1].medium)):
            told += [event for _, event in sorted(alike, key=lambda one: one[0])]
        return told

    def _tell(self, chunk: _Chunk) -> None:
        """Say in which media a chunk is now, where that has changed."""
        whole = (1 << len(self._parts)) - 1
        media = {MEDIA[tier] for tier, held in chunk.held.items() if held == whole}
        for medium in sorted(media - chunk.media):
            self._out.append((chunk.number, self._stored(chunk, medium)))
        for medium in sorted(chunk.media - media):
            self._removed(chunk, medium)
        chunk.media = media
        if len(self._out) > MOST_EVENTS:
            self._say_less()

    def _say_less(self) -> None:
        """The engine stands still, so nothing is published: say in short that all of it is gone."""
        gone: dict[str, dict[Any, None]] = {}
        for _, event in self._out:
            if isinstance(event, BlockRemoved):
                gone.setdefault(str(event.medium), {}).update(dict.fromkeys(event.block_hashes))
        for chunk in self._chunks.values():
            for medium in chunk.media:
                gone.setdefault(medium, {}).update(dict.fromkeys(chunk.hashes))
            chunk.media = set()
        self._out = [(0, self._gone(list(hashes), medium)) for medium, hashes in gone.items()]

    def _stored(self, chunk: _Chunk, medium: str) -> BlockStored:
        adapter, name = chunk.lora or (None, None)
        return BlockStored(
            block_hashes=list(chunk.hashes),
            parent_block_hash=chunk.parent,
            token_ids=chunk.tokens.tolist(),
            block_size=self._shape.block_tokens,
            lora_id=adapter,
            medium=medium,
            lora_name=name,
            group_idx=self._shape.group,
            kv_cache_spec_kind=self._shape.kind,
            locality=LOCALITY,
            ownership=OWNERSHIP,
        )

    def _removed(self, chunk: _Chunk, medium: str) -> None:
        last = self._out[-1][1] if self._out else None
        if isinstance(last, BlockRemoved) and last.medium == medium:
            last.block_hashes += chunk.hashes
            return
        self._out.append((0, self._gone(list(chunk.hashes), medium)))

    def _gone(self, hashes: list[Any], medium: str) -> BlockRemoved:
        return BlockRemoved(
            block_hashes=hashes,
            medium=medium,
            group_idx=self._shape.group,
            locality=LOCALITY,
            ownership=OWNERSHIP,
        )


class NodeWatch:
    """Watches the node for `Events`, on a thread and a connection of its own.

    Args:
        config: says which node.
        events: are told.
        meet: connects to it.
    """

    def __init__(
        self,
        config: Config,
        events: Events,
        meet: Callable[[Config], NodeClient] = connect,
    ) -> None:
        self._config = config
        self._events = events
        self._meet = meet
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.watching = threading.Event()
        """Set while it hears of everything."""

    def start(self) -> None:
        """Begin to watch. Repeatable."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvstrata-events", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Watch no more. Repeatable."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(2 * WATCH_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                client = self._meet(self._config)
            except (KVStrataError, OSError):
                self._closing.wait(RETRY_S)
                continue
            try:
                self._watch(client)
            except KVStrataError as error:
                logger.info("KVStrata: the node is not watched now: %s", error)
                self._closing.wait(RETRY_S)
            finally:
                self.watching.clear()
                client.close()
                self._events.lose()

    def _watch(self, client: NodeClient) -> None:
        names = ["host", *client.hello.tiers]
        since, knows = -1, False
        while not self._closing.is_set():
            call = client.begin(p.Watch, p.Watched, since, WATCH_S if knows else 0.0)
            answer: p.Watched = call.wait(ANSWER_S)
            if answer.lost:
                self._events.lose()
                knows = False
            for one in answer.changes:
                self._events.hear(names[one.tier], one.what, one.key, one.part)
            since = answer.next
            if not knows:
                # What has changed by now is in the answer to the next watch.
                keys = self._events.known()
                tiers = client.lookup(keys, self._events.parts) if keys else b""
                names_there = [names[tier] if tier != p.ABSENT else "" for tier in tiers]
                self._events.see(keys, names_there)
                knows = True
                self.watching.set()


def events_of(vllm_config: Any, kv_cache_config: Any, groups: Groups) -> Events | None:
    """As vLLM is configured: None where it publishes no KV events.

    They are of the first group that needs every chunk: of the others it depends on the boundary
    whether a chunk is of use.
    """
    wanted = getattr(vllm_config, "kv_events_config", None)
    group = groups.full
    if wanted is None or not wanted.enable_kv_cache_events or group is None:
        return None
    hash_tokens = getattr(kv_cache_config, "hash_block_size", None) or group.block_tokens
    kind = get_kv_cache_spec_kind(kv_cache_config.kv_cache_groups[group.index].kv_cache_spec)
    shape = Shape(
        groups.chunk_tokens, group.block_tokens, hash_tokens, str(kind.value), group.index
    )
    return Events(shape)
