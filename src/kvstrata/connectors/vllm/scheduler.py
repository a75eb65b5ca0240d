"""The connector in vLLM's scheduler: what a request finds, how it is loaded, what of it is stored.

The rules it keeps, each read in vLLM 0.32's source, are in ``docs/design.md`` under "Life of a
request in vLLM". Nothing here waits for the node longer than ``deadlines.match`` in a step, nor
longer than a small part of a step that others run in.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstrata.config import Config
from kvstrata.connectors.vllm.blending import Blending
from kvstrata.connectors.vllm.elsewhere import ask_for_what_is_there
from kvstrata.connectors.vllm.events import Events
from kvstrata.connectors.vllm.groups import Groups
from kvstrata.connectors.vllm.loads import load_of
from kvstrata.connectors.vllm.lookups import LOOK_AHEAD, Lookups
from kvstrata.connectors.vllm.meets import Meets, trial_of
from kvstrata.connectors.vllm.messages import (
    StepMetadata,
    WorkerHello,
    WorkerReport,
    layout_of,
)
from kvstrata.connectors.vllm.pace import Pace
from kvstrata.connectors.vllm.records import hit_sources, record_of
from kvstrata.connectors.vllm.requests import RequestState, bypass_of
from kvstrata.connectors.vllm.stats import Tally
from kvstrata.connectors.vllm.storing import Stores, part_at
from kvstrata.errors import Incompatible, KVStrataError
from kvstrata.wire import protocol as p

logger = logging.getLogger(__name__)


class SchedulerSide:
    """Plans loads and stores; lives in the engine core's process, on its one thread.

    Args:
        vllm_config: the engine's configuration.
        config: KVStrata's.
        groups: the engine's KV cache groups, and the chunks they are cut into.
        kv_cache_config: the engine's groups as vLLM has them.
        events: that vLLM publishes, if it does.
    """

    def __init__(
        self,
        vllm_config: Any,
        config: Config,
        groups: Groups,
        kv_cache_config: Any,
        events: Events | None = None,
    ) -> None:
        self.tally = Tally()  # for vLLM's own metrics
        self._groups = groups
        self._chunk = groups.chunk_tokens
        self._off = "the workers have not introduced themselves"
        self._worker_nodes: set[bytes] = set()
        self._copy_rate = 0.0  # bytes per second of the slowest worker; 0: unknown
        self._chunk_bytes = 0  # of a chunk, on the worker that has most of it
        self._most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._allowed = config.hints
        self._inside = config.inside == "on" and not groups.stateful
        self._keeps = config.reset == "keep"
        self._states: dict[str, RequestState] = {}
        self._active: set[str] = set()  # run or load, so that the engine is not idle
        self._admitted: set[str] = set()  # of them, run by no step yet: a wait holds none up
        self._loads: dict[str, tuple[int, bytes]] = {}  # in workers' hands: lease, first chunk
        self._loading_chunks: dict[bytes, str] = {}
        self._unrecorded: dict[str, RequestState] = {}  # ended, before their loads were heard of
        self._meeting: set[str] = set()  # of them, those that are computed meanwhile
        self._next = StepMetadata()
        self._pace = Pace(config.deadlines.match)
        self._meets = Meets(config.meet == "on", groups)
        self._lookups = Lookups(
            vllm_config, config, groups, self._pace, self._states, self._loads, events,
            self._meets.may_ask,
        )  # fmt: skip
        self._stores = Stores(self._lookups, groups)
        self.blending = Blending(
            vllm_config, kv_cache_config, config, groups, self._lookups, self._pace
        )

    def introduce(self, hellos: Mapping[tuple[int, int], WorkerHello]) -> None:
        """Learn of the workers' KV: before the first request, and when vLLM wakes from sleep."""
        ranked = [hellos[rank] for rank in sorted(hellos)]
        same, self._off = False, ""
        try:
            layout = layout_of(hellos)
            self._worker_nodes = {hello.node for hello in ranked}
            self._chunk_bytes = max(sum(one.payload_bytes for one in hello.held)
                                    for hello in ranked)  # fmt: skip
            same = self._lookups.learn(ranked, layout)
        except Incompatible as error:
            self._off = str(error)
        except Exception as error:
            logger.exception("KVStrata: the model cannot be identified")
            self._off = f"the model cannot be identified: {error}"
        if self._off:
            logger.error("KVStrata is off: %s", self._off)
        else:
            self._meets.introduce(ranked)
            self.blending.introduce(ranked)
        if not self._off and (why := ranked[0].why_alone):
            logger.warning("KVStrata shares no KV with engines of more or fewer ranks: %s", why)
        if not same:
            self._forsake("the workers have changed")

    # asked by vLLM's scheduler

    def on_new_request(self, request: Any) -> None:
        """Begin to look a request up."""
        bypass, tracer = self._off or bypass_of(request), self._lookups.tracer
        state = RequestState(
            request, bypass, tracer, self._allowed, self._inside, self._groups.prefix_only,
            self._groups.stateful,
        )  # fmt: skip
        self._states[request.request_id] = state
        self.blending.begin(state)
        # Those that wait already come first, whether they have asked or not.
        if not state.bypass and len(self._states) - len(self._active) <= LOOK_AHEAD:
            self._lookups.ask(state)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond the local ones that can be loaded, and whether in the background."""
        state = self._states.get(request.request_id)
        if state is not None:
            state.own_tokens = num_computed_tokens
        if state is None or state.bypass:
            return 0, False
        state.num_given = num_computed_tokens // self._chunk
        if state.failed or request.skip_reading_prefix_cache:
            return 0, False
        state.seen_at = time.monotonic()
        if request.request_id in self._loads:
            # Preempted before its load was reported: what that brings is not in the new blocks.
            return None, False
        if state.nothing_is_left(num_computed_tokens, self._chunk):
            self._lookups.let_be(state)
            return 0, False
        if state.chain is not None and state.rehash() and (state.matched or state.call):
            # A resumed request has outputs now, a session new input: what was found is of the past.
            self._lookups.give_up(state)
        if not state.matched:
            if state.call is None:
                if self._lookups.crowded():
                    return None, False
                if not self._lookups.ask(state):
                    return None, False
            busy = bool(self._active - self._admitted - {request.request_id})
            if not self._lookups.answered(state, busy=busy):
                return None, False
        if self._groups.stateful:
            part_at(state, self._chunk)
        found = state.num_found(self._chunk)
        first = num_computed_tokens // self._chunk
        if num_computed_tokens < found and first < state.num_whole:
            other = self._loading_chunks.get(state.asked[first], request.request_id)
            if other != request.request_id:
                # It loads this very chunk: wait, and find it in vLLM's own prefix cache.
                return None, False
        state.local_tokens = num_computed_tokens
        busy = bool(self._active - self._admitted - {request.request_id})
        blended = self.blending.answer(state, num_computed_tokens, busy=busy)
        if blended is None:
            return None, False
        if blended:
            state.sync = False
            return blended, True
        if found <= num_computed_tokens:
            return 0, False
        state.sync = self._may_load_sync(state, first)
        if state.sync:
            found = min(found, request.num_tokens - 1)
        if found <= num_computed_tokens:
            return 0, False
        return found - num_computed_tokens, not state.sync

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request got its blocks: hand its load to the workers."""
        state = self._states.get(request.request_id)
        if state is not None:
            state.granted(num_external_tokens)
        if state is None or state.bypass:
            return
        if request.request_id not in self._active:
            self._admitted.add(request.request_id)
        self._active.add(request.request_id)
        self._lookups.looking.discard(request.request_id)
        if request.request_id in self._loads:
            return
        if not state.roles.lends:  # what it found is to be kept for the other engine, too
            state.num_stored = max(state.num_stored, state.num_kept)
        if num_external_tokens == 0:
            self._lookups.give_up(state)
            self.blending.give_up(state)
            return
        if self.blending.is_next(state):
            self._begin_blend(state, blocks, num_external_tokens)
            return
        self.blending.give_up(state)
        load = load_of(state, self._lookups, self._groups, blocks, num_external_tokens)
        first, last = load.first_chunk, load.first_chunk + len(load.keys)
        slower = self._lookups.client.hello.tiers if self._lookups.client is not None else []
        names = state.tier_names = dict(enumerate(["host", *slower]))
        state.hit_chunks.update(names.get(tier, "?") for tier in state.tiers[first:last])
        state.loaded_tokens += num_external_tokens
        state.num_given = max(state.num_given, min(last, state.num_whole))
        if not state.roles.lends:  # likewise
            state.num_states = max(state.num_states, last)
        end = state.local_tokens + num_external_tokens
        state.inside_tokens = max(0, end - state.num_whole * self._chunk)
        chunk = state.asked[first] if first < state.num_whole else b""
        if chunk and state.found[first] != chunk:
            state.other_tokens += num_external_tokens
        state.loaded_how = "sync" if state.sync else "async"
        state.load_began = time.monotonic()
        if (front := self._meets.front(state, load, blocks, end)) is not None:
            load = replace(load, front=front)
            self._meeting.add(request.request_id)
        if state.sync:
            self._pace.copies(self._copy_s(last - first))
        self._loads[request.request_id] = (state.lease, chunk)
        if chunk:
            self._loading_chunks[chunk] = request.request_id
        (self._next.sync_loads if state.sync else self._next.async_loads).append(load)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Everything the workers have to do in this step."""
        meta, self._next = self._next, StepMetadata()
        client = self._lookups.attached()
        self._admitted.clear()
        meta.node = client.hello.node if client is not None else b""
        meta.num_tokens = scheduler_output.total_num_scheduled_tokens
        meta.fresh_blocks = self._groups.fresh(scheduler_output)
        resolve = scheduler_output.kv_connector_block_state
        storing = client is not None and not self._doubtful()
        num_pairs = 0.0
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            self._active.add(request_id)
            state = self._states.get(request_id)
            if state is not None:
                before = state.request.num_computed_tokens
                num_pairs += count * (before + count / 2)
                if not state.computed_at and before >= state.request.num_prompt_tokens:
                    state.computed_at = time.monotonic()
            if state is not None and storing and state.chain is not None:
                # A token that is sampled but not known yet has no key; a draft may be rejected.
                known = min(before + count, state.request.num_tokens)
                self.blending.computes(state, known)
                step = range(before, before + count)
                meta.stores += self._stores.of_step(state, step, known, resolve)
                self.blending.sign(state)
                if meta.trial is None and (self._meets.untried or self.blending.untried):
                    meta.trial = trial_of(state, step, resolve, self._groups)
        # What is computed inside a load says nothing of what else a step takes.
        inside = bool(self._meeting) or meta.trial is not None
        self._pace.step(0 if inside else meta.num_tokens, num_pairs)
        return meta

    def update_connector_output(self, output: Any) -> None:
        """Hear what the workers have done."""
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._worker_nodes = report.nodes
            self._lookups.compare(report.nodes)
            self._copy_rate = report.copy_rate or self._copy_rate
            for request_id, tokens in report.origins.items():
                state = self._states.get(request_id) or self._unrecorded.get(request_id)
                if state is not None:
                    state.loaded_from += tokens
            self._meets.hear(report.tried)
            self.blending.hear(report.tried, report.turned)
            for request_id, count in report.blended.items():
                if (state := self._states.get(request_id)) is not None:
                    self.blending.computed(state, count)
            for request_id, first in report.met.items():
                if (state := self._states.get(request_id)) is not None:
                    state.met(first, self._chunk)
            for request_id, first in report.came.items():
                if (state := self._states.get(request_id)) is not None:
                    # Of several ranks the one that has least counts.
                    state.came = first if state.came is None else min(first, state.came)
            for request_id, count in report.sync_loaded.items():
                if count >= self._lookups.num_workers:
                    self._end_load(request_id, failed=False)
        for request_id in output.finished_recving or ():
            self._end_load(request_id, failed=request_id in output.failed_recving)
        for request_id in self._unrecorded.keys() - self._loads.keys():
            self._record(self._unrecorded.pop(request_id))

    def request_finished(
        self, request: Any, block_ids: Sequence[list[int]]
    ) -> dict[str, Any] | None:
        """Forget a request; what it computed last is stored before its blocks are overwritten.

        Args:
            request: that has ended.
            block_ids: its blocks, of each group.

        Returns:
            What a proxy hands to the engine that goes on with it, where it was to be one.
        """
        self._retire(request.request_id)
        state = self._states.pop(request.request_id, None)
        if state is None:
            return None
        if state.sync and request.request_id in self._loads:  # it is heard of after this
            state.load_ended(self.tally, failed=False)
        state.ended(self.tally, self._chunk)
        answer = self._stores.elsewhere(state)
        if request.request_id in self._loads:
            self._lookups.abandon(state)
            self._next.called_off.add(request.request_id)
        else:
            self._lookups.give_up(state)
            known = min(request.num_computed_tokens - request.num_in_flight_tokens,
                        request.num_tokens, state.store_limit)  # fmt: skip
            if (
                state.chain is not None
                and self._lookups.client is not None
                and known // self._chunk > state.num_stored
            ):
                self._next.late_stores += self._stores.whole(state, known // self._chunk, block_ids)
            if state.chain is not None and self._lookups.client is not None:
                self._next.late_stores += self._stores.last(state, known, block_ids)
        self.blending.finished(state)
        self._stores.pin(state)
        if state.engines and request.request_id in self._loads:
            self._unrecorded[request.request_id] = state  # who computed it is yet to be heard
        else:
            self._record(state)
        return answer

    def hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Which tiers the tokens of a load come from."""
        state = self._states.get(request.request_id)
        if state is None or not num_external_tokens:
            return {}
        return hit_sources(state, num_external_tokens, self._chunk)

    def reset_cache(self) -> bool:
        """Begin a new namespace: nothing that was stored so far is found again by this engine.

        Unless its operator says that its weights stay what they are.
        """
        if self._keeps:
            logger.info("KVStrata keeps what was stored over a reset, since reset = keep")
            return True
        self._lookups.renew()
        # What runs now has KV of before and after; none of it may be stored.
        self._forsake("the cache was reset")
        return True

    def close(self) -> None:
        """Let go of the node. Repeatable."""
        self.blending.close()
        self._lookups.close()

    # how

    def _record(self, state: RequestState) -> None:
        """Tell operators of a request that has ended; it has ended well without that."""
        if (client := self._lookups.client) is None:
            return
        outcome = state.request.status.name.removeprefix("FINISHED_").lower()
        try:
            client.record(record_of(state, outcome, self._chunk))
        except KVStrataError as error:
            self.tally.add("unrecorded_requests_total", 1)
            logger.debug("KVStrata: a request has no record: %s", error)

    def _forsake(self, why: str) -> None:
        """Have nothing to do any more with the requests that are there."""
        for state in self._states.values():
            state.bypass, state.chain = why, None
            self.blending.give_up(state)
            if state.request.request_id in self._loads:
                self._lookups.abandon(state)
            else:
                self._lookups.give_up(state)
        self._next.stores.clear()
        self._next.late_stores.clear()

    def _begin_blend(self, state: RequestState, blocks: Any, num_external_tokens: int) -> None:
        """Hand a blend to the workers, which is a load to vLLM."""
        blend, tiers = self.blending.hand_over(state, blocks)
        slower = self._lookups.client.hello.tiers if self._lookups.client is not None else []
        names = state.tier_names = dict(enumerate(["host", *slower]))
        state.hit_chunks.update(names.get(tier, "?") for tier in tiers)
        state.loaded_tokens += sum(piece.count for piece in blend.pieces)
        state.num_given = max(state.num_given, state.num_whole)
        state.loaded_how, state.load_began = "async", time.monotonic()
        request_id = state.request.request_id
        self._meeting.add(request_id)
        self._loads[request_id] = (state.lease, b"")
        self._next.blends.append(blend)

    def _retire(self, request_id: str) -> None:
        """A request neither runs nor loads any more."""
        self._active.discard(request_id)
        self._admitted.discard(request_id)
        if not self._active:
            self._pace.rest()

    def _may_load_sync(self, state: RequestState, first: int) -> bool:
        """Whether the load cannot fail and nothing else would be held up by it for long."""
        client = self._lookups.client
        return (
            self._groups.prefix_only
            and client is not None
            and client.alive
            and self._worker_nodes == {client.hello.node}
            and p.ARRIVING not in state.offsets[first * len(self._lookups.parts) :]
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
        return num_chunks * self._chunk_bytes / self._copy_rate if self._copy_rate else math.inf

    def _doubtful(self) -> bool:
        """Whether a rank may have failed to load what the others compute with."""
        return self._lookups.num_workers > 1 and any(
            name in self._states and self._states[name].sync for name in self._loads
        )

    def _end_load(self, request_id: str, *, failed: bool) -> None:
        lease, chunk = self._loads.pop(request_id, (0, b""))
        self._meeting.discard(request_id)
        if self._loading_chunks.get(chunk) == request_id:
            del self._loading_chunks[chunk]
        if self._lookups.client is not None:
            self._lookups.client.release(lease)
        state = self._states.get(request_id)
        self.blending.ended(request_id, state, failed=failed)
        if state is not None:
            state.load_ended(self.tally, failed=failed)
            sync, came = state.sync, 0 if failed else state.came
            if came is not None:
                state.ended_early(came, self._chunk)
            state.forget_match()
            state.sync = sync
            if failed and state.expects_end:
                ask_for_what_is_there(state)
                self._retire(request_id)
            elif came is not None:
                # It would find the same again, and wait for it again.
                state.failed = True
                state.miss = "the load failed" if failed else f"the load ended before chunk {came}"
                self._retire(request_id)
