"""The connector in a vLLM worker: what it does, and in which order, in each of the engine's steps.

The engine's main thread waits in two places only: before a step that overwrites blocks which a
store still reads, and, on the CPU, inside a forward that a synchronous load feeds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvstrata.config import Config
from kvstrata.config.tracing import open_tracer
from kvstrata.connectors.link import Link
from kvstrata.connectors.vllm.blends import BlendJob
from kvstrata.connectors.vllm.copies import Copier, Runs, copy_runs, make_copier
from kvstrata.connectors.vllm.engines import shares
from kvstrata.connectors.vllm.fronts import Fronts
from kvstrata.connectors.vllm.gathering import Gatherer
from kvstrata.connectors.vllm.groups import Group, Groups
from kvstrata.connectors.vllm.messages import Blend, Load, StepMetadata, WorkerHello, WorkerReport
from kvstrata.connectors.vllm.origins import Origins
from kvstrata.connectors.vllm.pace import WAIT_SHARE
from kvstrata.connectors.vllm.pages import Pages, attention_layers, describe
from kvstrata.connectors.vllm.payloads import Payloads
from kvstrata.connectors.vllm.proof import self_test
from kvstrata.connectors.vllm.ranks import cut
from kvstrata.connectors.vllm.states import describe_states, prove_states
from kvstrata.connectors.vllm.stats import Tally
from kvstrata.connectors.vllm.transfers import Transfers
from kvstrata.errors import Incompatible, KVStrataError, UsageError
from kvstrata.wire.client import NodeClient

logger = logging.getLogger(__name__)

#: how long a step without a forward waits for a load to end
EMPTY_STEP_WAIT_S = 0.005
#: and one with a forward, for a load of what is there: its request would wait for a step more
STEP_WAIT_S = 0.002


class WorkerSide:
    """Does what the scheduler's side planned; lives in a worker's process.

    Made once vLLM has registered its KV caches: the bytes are proven to be understood, or the
    constructor refuses.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: the engine's KV cache groups, cut by shape.
        kv_caches: the engine's tensors by layer.
        link: the way to the node, already started.
        config: KVStrata's.
        groups: what these groups are to KVStrata.
        make_fronts: gives what computes loads from the front, from the pages of the engine's
            first group, or raises `Incompatible`; None: nothing does.

    Raises:
        Incompatible: the engine keeps KV in a way that is not understood; the reason is readable.
    """

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        kv_caches: dict[str, Any],
        link: Link,
        config: Config,
        groups: Groups,
        make_fronts: Callable[[Pages], Fronts] | None = None,
    ) -> None:
        parallel = vllm_config.parallel_config
        whole = {
            group: _pages(vllm_config, kv_cache_config, kv_caches, group)
            for group in (*groups.each, *groups.more)
            if kv_cache_config.kv_cache_groups[group.index].layer_names
        }
        others = shares(config, vllm_config, groups)  # they would find no slices
        self._cut = cut(vllm_config, groups, whole, shared="ranks" in config.share and not others)
        self._origins = Origins() if others else None
        self.payloads = {
            one.part: one
            for group, shard, some in self._cut.objects
            for one in [Payloads(some, groups, group, shard, self._origins)]
        }
        pages = next(iter(whole.values()))
        self._copier: Copier = make_copier(pages.device)
        #: what is counted for vLLM's own metrics
        self.tally = Tally()
        self._tracer = open_tracer(config.tracing, "kvstrata-worker")
        self._transfers = Transfers(
            self.payloads,
            self._copier,
            parallel.world_size,
            config.deadlines,
            self.tally,
            self._tracer,
        )
        self._on_cpu = pages.device.type == "cpu"
        self._chunk, self._block = groups.chunk_tokens, groups.each[0].block_tokens
        self._link = link
        self._client: NodeClient | None = None
        # this step's
        self._meta = StepMetadata()
        self._began = 0.0
        self._unfinished = False
        # by the layer that they have not been copied to
        self._sync_left: dict[str, list[Runs]] = {}
        self._sync_kept: list[object] = []
        self._sync_s = 0.0
        self._sync_bytes = 0
        self._sync_loaded: dict[str, int] = {}
        self._invalid: set[int] = set()
        self._came: dict[str, int] = {}
        # steps still to come that were planned before a failed synchronous load was heard of
        self._num_doubtful = 0
        self._num_in_flight = vllm_config.max_concurrent_batches
        self._fronts: Fronts | None = None
        self._no_fronts = ""
        if make_fronts is not None:
            try:
                self._fronts = make_fronts(pages)
            except Exception as error:  # another vLLM's, perhaps; loads go on without it
                self._no_fronts = str(error) or type(error).__name__
                if not isinstance(error, Incompatible):
                    logger.exception("KVStrata cannot compute inside loads")
        turning = self._fronts.turning if self._fronts is not None else None
        self._gatherer = (
            Gatherer(self.payloads, self._copier, turning.rotary, self._chunk)
            if turning is not None
            else None
        )
        # vLLM 0.32 unmaps the blocks of an engine that falls asleep without a word to anybody.
        self._drain_always = vllm_config.model_config.enable_sleep_mode and not hasattr(
            KVConnectorBase_V1, "unregister_kv_caches"
        )
        link.wait(config.deadlines.attach)
        self._attach()

    def hello(self) -> WorkerHello:
        """What the scheduler's side must know."""
        return WorkerHello(
            held=tuple(one.held() for one in self.payloads.values()),
            layout=self._cut.layout,
            node=self._node,
            slices=self._cut.slices,
            why_alone=self._cut.why_alone,
            no_fronts=self._no_fronts,
            no_blends=self._no_fronts
            or (self._fronts.no_blends if self._fronts is not None else ""),
        )

    # called by vLLM's model runner, in this order in each step

    def before_step(self, meta: StepMetadata) -> None:
        """Nothing that this step overwrites may still be read by a store."""
        if self._unfinished:
            # With drafts and a pipeline vLLM ends its steps on the last rank only. The leases of
            # loads may be gone by now, but other ranks have no layers that a forward leaves out.
            self._sync_left.clear()
            self.after_forward(timed=False)
        self._began = time.monotonic()
        self._follow(meta)
        self._transfers.call_off(meta.called_off)
        if self._fronts is not None:
            self._fronts.call_off(meta.called_off)
        self._begin_stores(meta.late_stores, 0.0)
        overwritten = set(meta.fresh_blocks)
        for load in (*meta.sync_loads, *meta.async_loads):
            overwritten.update(load.blocks)
        for blend in meta.blends:
            overwritten.update(blend.table[blend.start // self._block :])
        self._transfers.stores.fence(overwritten)

    def bind(self, meta: StepMetadata) -> None:
        """Begin this step's asynchronous loads."""
        self._meta = meta
        self._unfinished = True
        if meta.async_loads:
            meetings = self._fronts.meetings if self._fronts is not None else None
            self._transfers.begin_loads(meta.async_loads, self._client, meetings)
        if meta.blends:
            self._begin_blends(meta.blends)

    def load_sync(self) -> None:
        """Prepare the copies that this forward needs; on a GPU, do them.

        The scheduler's side asks for a synchronous load only when it cannot fail. Should one fail
        all the same, its blocks are reported and vLLM computes them.
        """
        for load in self._meta.sync_loads:
            self._sync_loaded[load.request_id] = 1
            try:
                self._begin_sync(load)
            except Exception as error:
                logger.error(
                    "KVStrata: request %s is computed: %s", load.request_id, error,
                    exc_info=not isinstance(error, KVStrataError),
                )  # fmt: skip
                self._invalid.update(block for block in load.blocks if block >= 0)
                self._num_doubtful = self._num_in_flight

    def _begin_sync(self, load: Load) -> None:
        """Prepare one synchronous load's copies; do those that cannot wait for their layer.

        vLLM writes a layer's new KV before it asks for the layer. So what shares a block with that,
        the end of a load that ends inside one, is copied before the forward.
        """
        count = len(load.keys)
        waiting = count - bool(load.tail_tokens) if self._on_cpu else 0
        late, kept = self._transfers.plan(load, self._client, load.offsets, 0, waiting)
        early, _kept = self._transfers.plan(load, self._client, load.offsets, waiting, count)
        self._sync_bytes += sum(plan.nbytes for plan in (*late, *early))
        self._sync_kept.append(kept)
        for plan in late:
            for i, name in enumerate(plan.layer_names):
                self._sync_left.setdefault(name, []).append(plan.runs(i))
        for plan in early:
            begun = time.perf_counter()
            self._copier.load(plan, self._copier.mark())
            self._sync_s += time.perf_counter() - begun

    def load_layer(self, layer_name: str) -> None:
        """Copy one layer of the synchronous loads, just before attention reads it first.

        A draft model may read its layers more than once in a step, and writes between.
        """
        if layer_name in self._sync_left:
            self._copy_layer(layer_name)

    def after_forward(self, *, timed: bool = True) -> None:
        """Begin this step's stores.

        Args:
            timed: whether this is the end of the step, so that its time says what it took.
        """
        meta = self._meta
        self._unfinished = False
        for layer_name in tuple(self._sync_left):  # of a draft model that had nothing to do
            self._copy_layer(layer_name)
        self._transfers.rate.note(self._sync_bytes, self._sync_s)
        self._sync_bytes, self._sync_s = 0, 0.0
        self._sync_kept.clear()
        if self._fronts is not None and meta.trial is not None:
            self._fronts.prove(meta.trial)
        if self._num_doubtful:
            # This step's KV was computed from blocks that were not filled.
            self._num_doubtful -= 1
        elif meta.stores:
            # A step of a few tokens says nothing about what computing a chunk takes.
            seconds = (time.monotonic() - self._began) * self._chunk / max(meta.num_tokens, 1)
            self._begin_stores(
                meta.stores,
                chunk_cost(seconds) if timed and meta.num_tokens >= self._chunk else 0.0,
            )
        if self._drain_always:
            self._transfers.stores.fence()

    def loads_ended(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended since the last step, and those of them that failed."""
        if self._compute_fronts():
            ended = self._transfers.loads_ended(0.0)
        elif self._meta.num_tokens:
            wait_s = min(STEP_WAIT_S, WAIT_SHARE * (time.monotonic() - self._began))
            ended = self._transfers.loads_ended(wait_s, idle=False)
        else:
            ended = self._transfers.loads_ended(EMPTY_STEP_WAIT_S)
        for request_id, (first, missing) in self._transfers.loads_cut().items():
            self._came[request_id] = first
            self._invalid |= missing
        return ended

    def invalid_blocks(self) -> set[int]:
        """Blocks that loads which have ended did not fill; asked for after `loads_ended`."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def report(self) -> WorkerReport:
        """What the scheduler's side wants to hear after each step."""
        loaded, self._sync_loaded = self._sync_loaded, {}
        came, self._came = self._came, {}
        fronts = self._fronts.report() if self._fronts is not None else {}
        return WorkerReport(
            {self._node},
            loaded,
            came,
            self._transfers.rate.best(),
            self._origins.take() if self._origins is not None else {},
            **fronts,
        )

    def drain(self) -> None:
        """Return when no copy reads or writes the engine's blocks: they are about to be unmapped.

        They come back at the same addresses, so that nothing is to be done then.
        """
        self._transfers.stores.fence()
        self._transfers.settle()

    def close(self) -> None:
        """End what is under way and let go of the node. Repeatable."""
        if self._fronts is not None:
            self._fronts.close()
        self._transfers.close()
        if self._tracer is not None:
            self._tracer.close()
        self._link.close()
        self._detach()

    # how

    def _compute_fronts(self) -> bool:
        """Compute a slice of a load that has a part to compute; whether that was done."""
        if self._fronts is None:
            return False
        met, blended, computed = self._fronts.step(self._meta.num_tokens)
        for meeting in met:
            self._transfers.meeting_ended(meeting)
        for name, _, failed in blended:
            self._transfers.blend_ended(name, failed=failed)
        return computed

    def _begin_blends(self, blends: Sequence[Blend]) -> None:
        """Begin blends, or tell that they fail; the same on all ranks."""
        begun: list[BlendJob] = []
        for blend in blends:
            try:
                if self._fronts is None or self._fronts.blends is None or self._gatherer is None:
                    raise UsageError("this worker blends nothing")
                job = BlendJob(blend)
            except UsageError as error:
                logger.error("KVStrata: request %s is computed: %s", blend.request_id, error)
                self._transfers.blend_ended(blend.request_id, failed=True)
            else:
                self._fronts.blends.begin(job)
                begun.append(job)
        if begun and self._gatherer is not None:
            self._transfers.begin_blends(begun, self._gatherer, self._client)

    def _copy_layer(self, layer_name: str) -> None:
        begun = time.perf_counter()
        for slots, blocks, lengths in self._sync_left.pop(layer_name):
            copy_runs(blocks, slots, lengths)
        self._sync_s += time.perf_counter() - begun

    @property
    def _node(self) -> bytes:
        return self._client.hello.node if self._client is not None else b""

    def _begin_stores(self, stores: list[Any], cost: float) -> None:
        if self._client is not None and self._client.alive:
            for store in stores:
                if self._transfers.read_portable:
                    # What was loaded may be lossy, and must not go through a lossy codec again.
                    store = store.computed()
                if store.blocks:
                    self._transfers.stores.begin(store, self._client, cost)

    def _follow(self, meta: StepMetadata) -> None:
        """Stay with the scheduler's node: leave a dead one's memory before joining the next."""
        if meta.sync_loads:
            return
        client = self._client
        if client is not None:
            another = meta.node and meta.node != self._node
            if another or not client.alive:
                self._detach()
        if self._client is None:
            self._attach()

    def _attach(self) -> None:
        self._client = self._link.take()
        if self._client is None:
            self._link.start()
        else:
            self._copier.attach(self._client.pool)

    def _detach(self) -> None:
        if self._client is not None:
            # Nothing may read or write a mapping that is about to go.
            self._transfers.settle()
            self._copier.detach()
            self._client.close()
            self._client = None


def chunk_cost(seconds: float) -> float:
    """What computing a chunk costs, as a power of two: a prompt's head must not seem cheaper than
    its tail over a few per cent, or it would be evicted first."""
    return 2.0 ** round(math.log2(max(seconds, 1e-6)))


def _pages(
    vllm_config: Any, kv_cache_config: Any, kv_caches: dict[str, Any], group: Group
) -> Pages:
    """This worker's pages of one group, whose bytes are proven to be understood.

    Raises:
        Incompatible: they are not.
    """
    stateful = group.kind == "recurrent"
    find, prove = (describe_states, prove_states) if stateful else (describe, self_test)
    pages = find(kv_caches, vllm_config, kv_cache_config, group.index)
    prove(pages, kv_caches, attention_layers(pages, vllm_config))
    return pages
