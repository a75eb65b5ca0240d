"""The connector in vLLM's scheduler: what a request finds, how it is loaded, what of it is stored.

The rules it keeps, each read in vLLM 0.32's source, are in ``docs/design.md`` under "Life of a
request in vLLM". Nothing here waits for the node longer than ``deadlines.match`` in a step, nor
longer than a small part of a step that others run in.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstrata.config import Config
from kvstrata.connectors.vllm.fingerprint import Namespaces
from kvstrata.connectors.vllm.link import Link
from kvstrata.connectors.vllm.messages import Load, StepMetadata, Store, WorkerHello, WorkerReport
from kvstrata.connectors.vllm.pace import Pace
from kvstrata.connectors.vllm.requests import RequestState
from kvstrata.errors import KVStrataError, NodeUnavailable
from kvstrata.keys import KeyChain, owner_digest
from kvstrata.parts import PORTABLE
from kvstrata.quality.bound import Bound
from kvstrata.quality.choice import trouble
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

logger = logging.getLogger(__name__)

#: requests that have not been scheduled yet and hold a lease, at most; the others ask in their turn
LOOK_AHEAD = 8
#: how long the start waits for the weights' identity; later requests wait for nothing
IDENTITY_WAIT_S = 10.0


class SchedulerSide:
    """Plans loads and stores; lives in the engine core's process, on its one thread.

    Args:
        vllm_config: the engine's configuration.
        config: KVStrata's.
        chunk_tokens: tokens of a chunk, a whole number of blocks.
        block_tokens: tokens of one of vLLM's blocks.
    """

    def __init__(
        self, vllm_config: Any, config: Config, chunk_tokens: int, block_tokens: int
    ) -> None:
        self._config = config
        self._chunk = chunk_tokens
        self._block = block_tokens
        self._link = Link(config, "scheduler")
        self._link.start()
        self._client: NodeClient | None = None
        self._off = "the workers have not introduced themselves"
        self._orders: list[str] = []
        self._parts: list[int] = []
        self._lengths: list[int] = []
        self._model = vllm_config.model_config.model
        self._namespaces = Namespaces(vllm_config, chunk_tokens, config.tenant)
        self._worker_nodes: set[bytes] = set()
        self._pace = Pace(config.deadlines.match)
        self._copy_rate = 0.0  # bytes per second of the slowest worker; 0: unknown
        self._most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._states: dict[str, RequestState] = {}
        # requests that run or load, so that the engine is not idle
        self._active: set[str] = set()
        # those of them that no step has run yet, and that a wait does not hold up
        self._admitted: set[str] = set()
        # requests that have asked or hold a lease, and have not been scheduled
        self._looking: set[str] = set()
        # loads in the workers' hands: their lease, and the first chunk they bring
        self._loads: dict[str, tuple[int, bytes]] = {}
        self._loading_chunks: dict[bytes, str] = {}
        self._next = StepMetadata()
        self._inexact = False

    def introduce(self, hellos: Mapping[tuple[int, int], WorkerHello]) -> None:
        """Learn of the workers' KV: before the first request, and when vLLM wakes from sleep."""
        before = self._orders, self._parts, self._lengths
        ranked = [hellos[rank] for rank in sorted(hellos)]
        problems = [hello.problem for hello in ranked if hello.problem]
        if problems:
            self._off = problems[0]
        elif len({hello.order for hello in ranked}) != 1:
            self._off = f"the workers keep KV in different orders: {[h.order for h in ranked]}"
        else:
            self._off = ""
            self._orders = [ranked[0].order, PORTABLE]
            self._parts = list(range(len(ranked)))
            self._lengths = [hello.payload_bytes for hello in ranked]
            layout = "; ".join(hello.layout for hello in ranked)
            self._worker_nodes = {hello.node for hello in ranked}
            try:
                self._namespaces.identify(layout, IDENTITY_WAIT_S)
            except Exception as error:
                logger.exception("KVStrata: the model cannot be identified")
                self._off = f"the model cannot be identified: {error}"
        if self._off:
            logger.error("KVStrata is off: %s", self._off)
        else:
            self._namespaces.when_weighed(self._explain_auto)
            self._link.wait(self._config.deadlines.attach)
        if self._off or before != (self._orders, self._parts, self._lengths):
            self._forsake("the workers have changed")

    # asked by vLLM's scheduler

    def on_new_request(self, request: Any) -> None:
        """Begin to look a request up."""
        state = self._states[request.request_id] = RequestState(request, self._bypass(request))
        # Those that wait already come first, whether they have asked or not.
        if not state.bypass and len(self._states) - len(self._active) <= LOOK_AHEAD:
            self._ask(state)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond the local ones that can be loaded, and whether in the background."""
        state = self._states.get(request.request_id)
        if state is None or state.bypass or state.failed or request.skip_reading_prefix_cache:
            return 0, False
        state.seen_at = time.monotonic()
        state.num_local = num_computed_tokens
        if request.request_id in self._loads:
            # Preempted before its load was reported: what that brings is not in the new blocks.
            return None, False
        if num_computed_tokens // self._chunk >= request.num_tokens // self._chunk:
            self._let_be(state)
            return 0, False
        if state.chain is not None and state.rehash() and (state.matched or state.call):
            # A resumed request has outputs now, a session new input: what was found is of the past.
            self._give_up(state)
        if not state.matched:
            if state.call is None:
                if self._crowded():
                    return None, False
                if not self._ask(state):
                    return None, False
            if not self._answered(state):
                return None, False
        found = len(state.tiers) * self._chunk
        if found <= num_computed_tokens:
            return 0, False
        first = num_computed_tokens // self._chunk
        if self._loading_chunks.get(state.keys[first], request.request_id) != request.request_id:
            # Somebody loads this very chunk: wait, and find it in vLLM's own prefix cache.
            return None, False
        state.local_tokens = num_computed_tokens
        state.sync = self._may_load_sync(state, first)
        if state.sync:
            found = min(found, request.num_tokens - 1)
        if found <= num_computed_tokens:
            return 0, False
        return found - num_computed_tokens, not state.sync

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request got its blocks: hand its load to the workers."""
        state = self._states.get(request.request_id)
        if state is None or state.bypass:
            return
        if request.request_id not in self._active:
            self._admitted.add(request.request_id)
        self._active.add(request.request_id)
        self._looking.discard(request.request_id)
        if request.request_id in self._loads:
            return
        state.num_stored = max(state.num_stored, len(state.tiers))
        if self._inexact:
            # What vLLM has may have been through a lossy codec, and must not go through it again.
            state.num_stored = max(state.num_stored, state.num_local // self._chunk)
        if num_external_tokens == 0:
            self._give_up(state)
            return
        end = state.local_tokens + num_external_tokens
        first, last = state.local_tokens // self._chunk, -(-end // self._chunk)
        if last < len(state.tiers) and self._client is not None:
            self._client.release(state.lease, keep=last)
        load = Load(
            request_id=request.request_id,
            node=self._client.hello.node if self._client is not None else b"",
            lease=state.lease,
            first_chunk=first,
            offsets=[
                state.offsets[i * len(self._parts) : (i + 1) * len(self._parts)].tolist()
                for i in range(first, last)
            ],
            keys=state.keys[first:last],
            blocks=self._targets(blocks.get_block_ids()[0], state.local_tokens, end, first, last),
        )
        slower = self._client.hello.tiers if self._client is not None else []
        names = dict(enumerate(["host", *slower]))
        state.hit_chunks.update(names.get(tier, "?") for tier in state.tiers[first:last])
        state.loaded_tokens += num_external_tokens
        state.loaded_how = "sync" if state.sync else "async"
        if state.sync:
            self._pace.copies(self._copy_s(last - first))
        self._loads[request.request_id] = (state.lease, state.keys[first])
        self._loading_chunks[state.keys[first]] = request.request_id
        (self._next.sync_loads if state.sync else self._next.async_loads).append(load)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Everything the workers have to do in this step."""
        meta, self._next = self._next, StepMetadata()
        client = self._attached()
        self._admitted.clear()
        meta.node = client.hello.node if client is not None else b""
        meta.num_tokens = scheduler_output.total_num_scheduled_tokens
        meta.fresh_blocks = self._fresh_blocks(scheduler_output)
        resolve = scheduler_output.kv_connector_block_state
        storing = client is not None and not self._doubtful()
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            self._active.add(request_id)
            state = self._states.get(request_id)
            if state is not None and storing and state.chain is not None:
                # A token that is sampled but not known yet has no key; a draft may be rejected.
                known = min(state.request.num_computed_tokens + count, state.request.num_tokens)
                if known // self._chunk > state.num_stored:
                    blocks = resolve.get_block_ids(request_id)[0]
                    meta.stores.append(self._store(state, known // self._chunk, blocks))
        self._pace.step(meta.num_tokens)
        return meta

    def update_connector_output(self, output: Any) -> None:
        """Hear what the workers have done."""
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._worker_nodes = report.nodes
            self._inexact = self._inexact or report.portable
            self._copy_rate = report.copy_rate or self._copy_rate
            for request_id, first in report.came.items():
                if (state := self._states.get(request_id)) is not None:
                    # Of several ranks the one that has least counts.
                    state.came = first if state.came is None else min(first, state.came)
            for request_id, count in report.sync_loaded.items():
                if count >= len(self._parts):
                    self._end_load(request_id, failed=False)
        for request_id in output.finished_recving or ():
            self._end_load(request_id, failed=request_id in output.failed_recving)

    def request_finished(self, request: Any, block_ids: list[int]) -> None:
        """Forget a request; what it computed last is stored before its blocks are overwritten."""
        self._retire(request.request_id)
        state = self._states.pop(request.request_id, None)
        if state is None:
            return
        if request.request_id in self._loads:
            self._abandon(state)
        else:
            self._give_up(state)
            known = min(request.num_computed_tokens - request.num_in_flight_tokens,
                        request.num_tokens)  # fmt: skip
            if (
                state.chain is not None
                and self._client is not None
                and known // self._chunk > state.num_stored
            ):
                store = self._store(state, known // self._chunk, block_ids)
                if len(store.blocks) == (len(store.prefix) - store.first) * self._blocks_per_chunk:
                    self._next.late_stores.append(store)
        if self._client is not None:
            outcome = request.status.name.removeprefix("FINISHED_").lower()
            self._client.record(state.record(outcome, self._chunk))

    def hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Which tiers the tokens of a load come from."""
        state = self._states.get(request.request_id)
        if state is None or not num_external_tokens:
            return {}
        # The tier of encoded objects is in host memory, too.
        slower = min(num_external_tokens, state.hit_chunks["disk"] * self._chunk)
        sources = {
            CacheHitSource.HOST: num_external_tokens - slower,
            CacheHitSource.DISK: slower,
        }
        return {source: count for source, count in sources.items() if count}

    def reset_cache(self) -> bool:
        """Begin a new namespace: nothing that was stored so far is found again by this engine."""
        self._namespaces.renew()
        # What runs now has KV of before and after; none of it may be stored.
        self._forsake("the cache was reset")
        return True

    def close(self) -> None:
        """Let go of the node. Repeatable."""
        self._namespaces.close()
        self._link.close()
        if self._client is not None:
            self._client.close()
            self._client = None

    # how

    @property
    def _blocks_per_chunk(self) -> int:
        return self._chunk // self._block

    def _bypass(self, request: Any) -> str:
        """Why nothing of a request is cached; empty if it is."""
        if self._off:
            return self._off
        if request.prompt_embeds is not None or request.prompt_token_ids is None:
            return "prompt embeddings have no token ids"
        if request.pooling_params is not None:
            return "pooling requests are not cached"
        if any(item.identifier is None for item in request.mm_features):
            return "a multimodal item has no identifier"
        if request.lora_request is not None and request.lora_request.load_inplace:
            return "an adapter that is reloaded in place has no lasting identity"
        return ""

    def _forsake(self, why: str) -> None:
        """Have nothing to do any more with the requests that are there."""
        for state in self._states.values():
            state.bypass, state.chain = why, None
            if state.request.request_id in self._loads:
                self._abandon(state)
            else:
                self._give_up(state)
        self._next.stores.clear()
        self._next.late_stores.clear()

    def _attached(self) -> NodeClient | None:
        """The node, if there is one now; begins to look for one if not."""
        if self._client is not None and not self._client.alive:
            logger.warning("KVStrata: the node is gone; the engine computes everything")
            self._client.close()
            self._client = None
            self._looking.clear()
            # Leases died with their node. Loads in the workers' hands end by themselves.
            for state in self._states.values():
                state.lease = 0
                if state.request.request_id not in self._loads:
                    state.forget_match()
        if self._client is None:
            self._client = self._link.take()
            if self._client is None:
                self._link.start()
        return self._client

    def _identify(self, state: RequestState, client: NodeClient) -> bool:
        """Make a request's keys possible; False while its adapter is unknown, or for good."""
        try:
            namespace = self._namespaces.of(state.request)
            if namespace is None:
                return False
            state.namespace = namespace
            salt = state.request.cache_salt or ""
            state.owner = owner_digest(client.hello.secret, self._config.tenant, salt)
            state.chain = KeyChain(client.hello.secret, namespace, self._chunk, salt)
        except (KVStrataError, OSError) as error:
            state.bypass = f"an identity is missing: {error}"
            state.matched = True
            return False
        return True

    def _ask(self, state: RequestState) -> bool:
        """Begin a request's match; False while its adapter is still being identified."""
        client = self._attached()
        state.miss = ""
        if client is None:
            state.matched, state.miss = True, "no node"
            return True
        if state.chain is None and not self._identify(state, client):
            return state.matched
        state.rehash()
        if not state.keys:
            state.matched, state.miss = True, "shorter than a chunk"
            return True
        try:
            state.call = client.match(
                state.keys, self._parts, self._orders, self._lengths, state.owner
            )
            self._looking.add(state.request.request_id)
            state.seen_at = time.monotonic()
        except NodeUnavailable:
            state.matched, state.miss = True, "no node"
        state.asked_at = time.monotonic()
        return True

    def _answered(self, state: RequestState) -> bool:
        """Take in a match's answer; False if it has not come and may still."""
        if state.call is None:
            return True
        try:
            if not state.call.ready():
                self._wait(state)
            if state.call.reply is None:
                if time.monotonic() - state.asked_at < self._config.deadlines.request:
                    return False
                state.call.abandon()
                state.miss = "the match missed its deadline"
            else:
                reply: p.Matched = state.call.wait(0)
                state.lease, state.tiers = reply.lease, reply.tiers
                state.offsets = offsets_of(reply.offsets)
                if len(reply.tiers) < len(state.keys):
                    state.miss = "not stored" if not reply.tiers else "partly stored"
        except KVStrataError as error:
            state.miss = f"the match failed: {error}"
        state.call = None
        state.matched = True
        if not state.lease:
            self._looking.discard(state.request.request_id)
        return True

    def _wait(self, state: RequestState) -> None:
        """Wait for a match as long as that costs less than to ask again a step later."""
        busy = bool(self._active - self._admitted - {state.request.request_id})
        patience = self._pace.patience_s(busy=busy)
        # Whoever runs is held up once by a match, not in every step by a node that hangs.
        if state.call is None or self._client is None or not patience or (busy and state.waited):
            return
        state.waited = True
        begun = self._pace.clock()
        try:
            self._client.pump(state.call, patience)
        finally:
            self._pace.waited(self._pace.clock() - begun)

    def _let_be(self, state: RequestState) -> None:
        """vLLM has every whole chunk itself: wait for nothing, and hold nothing."""
        client = self._attached()
        if state.chain is None and client is not None:
            self._identify(state, client)
        if state.call is not None and state.call.reply is not None:
            self._answered(state)
            # What the node has need not be stored again.
            state.num_stored = max(state.num_stored, len(state.tiers))
        self._give_up(state)

    def _retire(self, request_id: str) -> None:
        """A request neither runs nor loads any more."""
        self._active.discard(request_id)
        self._admitted.discard(request_id)
        if not self._active:
            self._pace.rest()

    def _may_load_sync(self, state: RequestState, first: int) -> bool:
        """Whether the load cannot fail and nothing else would be held up by it for long."""
        client = self._client
        return (
            client is not None
            and client.alive
            and self._worker_nodes == {client.hello.node}
            and p.ARRIVING not in state.offsets[first * len(self._parts) :]
            and self._copy_is_short(state, first)
        )

    def _copy_is_short(self, state: RequestState, first: int) -> bool:
        """Whether those that run may wait for a load, and take account of it if so."""
        if not self._active - {state.request.request_id}:
            return True
        left = max(1, state.request.num_tokens - len(state.tiers) * self._chunk)
        copy_s = self._copy_s(len(state.tiers) - first)
        return self._pace.is_short(copy_s, min(left, self._most_tokens))

    def _copy_s(self, num_chunks: int) -> float:
        """What the slowest worker takes to copy so many chunks; `inf` if that is unknown."""
        return num_chunks * max(self._lengths) / self._copy_rate if self._copy_rate else math.inf

    def _crowded(self) -> bool:
        """Whether enough requests look ahead; one that vLLM passes over does not count for long."""
        if len(self._looking) < LOOK_AHEAD:
            return False
        since = time.monotonic() - self._config.deadlines.request
        return sum(self._states[name].seen_at > since for name in self._looking) >= LOOK_AHEAD

    def _doubtful(self) -> bool:
        """Whether a rank may have failed to load what the others compute with."""
        return len(self._parts) > 1 and any(
            name in self._states and self._states[name].sync for name in self._loads
        )

    def _targets(
        self, block_ids: list[int], local: int, end: int, first: int, last: int
    ) -> list[int]:
        """The blocks of chunks ``first`` to ``last``, -1 for those not to be written."""
        per_chunk = self._blocks_per_chunk
        wanted = range(local // self._block, min(-(-end // self._block), len(block_ids)))
        return [
            block_ids[i] if i in wanted else -1 for i in range(first * per_chunk, last * per_chunk)
        ]

    def _store(self, state: RequestState, done: int, block_ids: list[int]) -> Store:
        """Store the chunks from the first unstored one up to number ``done``."""
        state.rehash()
        first, per_chunk = state.num_stored, self._blocks_per_chunk
        state.num_stored = done
        state.stored_chunks += done - first
        return Store(
            namespace=state.namespace,
            prefix=state.keys[:done],
            first=first,
            blocks=list(block_ids[first * per_chunk : done * per_chunk]),
            weights=self._namespaces.weights_of(state.request),
            owner=state.owner,
        )

    def _explain_auto(self, weights: str) -> None:
        """Say at the start, and where the operator looks, why ``codec = auto`` stays lossless."""
        names = [part.name for part in self._config.tiers if part.codec == "auto"]
        if names and (why := trouble(weights, Bound.parse(self._config.quality), self._model)):
            logger.error("KVStrata: %s.codec is auto, but stores losslessly: %s", names[0], why)

    def _end_load(self, request_id: str, *, failed: bool) -> None:
        lease, chunk = self._loads.pop(request_id, (0, b""))
        if self._loading_chunks.get(chunk) == request_id:
            del self._loading_chunks[chunk]
        if self._client is not None:
            self._client.release(lease)
        state = self._states.get(request_id)
        if state is not None:
            sync = state.sync
            state.forget_match()
            state.sync = sync
            came = 0 if failed else state.came
            if came is not None:
                # It would find the same again, and wait for it again.
                state.failed = True
                state.miss = "the load failed" if failed else f"the load ended before chunk {came}"
                # What it was thought to have is not there: store what is recomputed.
                lost = state.num_stored - came
                state.loaded_tokens = max(0, state.loaded_tokens - lost * self._chunk)
                state.num_stored = came
                self._retire(request_id)

    def _abandon(self, state: RequestState) -> None:
        if state.call is not None:
            state.call.abandon()
            state.call = None

    def _give_up(self, state: RequestState) -> None:
        """Let go of what a request asked for or found."""
        self._looking.discard(state.request.request_id)
        self._abandon(state)
        if state.lease and self._client is not None:
            self._client.release(state.lease)
        state.forget_match()

    def _fresh_blocks(self, scheduler_output: Any) -> set[int]:
        """Blocks that this step may overwrite although an earlier step's store reads them."""
        fresh: set[int] = set(scheduler_output.new_block_ids_to_zero or ())
        for new in scheduler_output.scheduled_new_reqs:
            fresh.update(new.block_ids[0][new.num_computed_tokens // self._block :])
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if (ids := cached.new_block_ids[i]) is not None:
                skip = (
                    cached.num_computed_tokens[i] // self._block
                    if request_id in cached.resumed_req_ids
                    else 0
                )
                fresh.update(ids[0][skip:])
        for copy in scheduler_output.kv_cache_block_copies or ():
            fresh.add(copy.dst_block_id)
        return fresh
