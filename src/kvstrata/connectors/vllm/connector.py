"""vLLM's connector interface, answered by the two sides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from kvstrata.config import load_config
from kvstrata.connectors.link import Link
from kvstrata.connectors.vllm.events import Events, events_of
from kvstrata.connectors.vllm.fronts import Fronts, fronts_of
from kvstrata.connectors.vllm.groups import Groups, cut_by_shape, groups_of
from kvstrata.connectors.vllm.messages import StepMetadata, WorkerHello
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.connectors.vllm.scheduler import SchedulerSide
from kvstrata.connectors.vllm.stats import ConnectorPromMetrics, ConnectorStats
from kvstrata.connectors.vllm.worker import WorkerSide
from kvstrata.errors import Incompatible, KVStrataError

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.32.0",)


class KVStrataConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps vLLM's KV in a KVStrata node; ``docs/vllm.md`` says how to use it.

    vLLM makes one instance in the scheduler and one in each worker. When a model or an engine is
    one that KVStrata does not cache, it says so once in the log and the engine runs as if it were
    not there.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        config = load_config(overrides=transfer.kv_connector_extra_config)
        _log_as_vllm_does(config.log)
        self._scheduler: SchedulerSide | None = None
        self._events: Events | None = None
        self._worker: WorkerSide | None = None
        self._make_worker: Callable[[dict[str, Any]], WorkerSide] | None = None
        self._problem = "vLLM registered no KV caches"
        groups: Groups | None = None
        reason = ""
        try:
            groups = groups_of(kv_cache_config, config)
            kv_cache_config = cut_by_shape(kv_cache_config)
            _refuse_reference_latents(vllm_config, kv_cache_config)
        except Incompatible as error:
            groups, reason = None, str(error)
            self._problem = reason
        if role is KVConnectorRole.SCHEDULER:
            _greet(transfer, reason)
        if groups is None:
            return
        if role is KVConnectorRole.SCHEDULER:
            _say_stride(groups, vllm_config.scheduler_config.max_num_batched_tokens)
            self._events = events_of(vllm_config, kv_cache_config, groups)
            self._scheduler = SchedulerSide(
                vllm_config, config, groups, kv_cache_config, self._events
            )
        else:
            self._link = Link(config, f"worker of rank {vllm_config.parallel_config.rank}")
            self._link.start()

            def make(kv_caches: dict[str, Any]) -> WorkerSide:
                def fronts(pages: Pages) -> Fronts:
                    return fronts_of(
                        vllm_config, kv_cache_config, kv_caches, pages, groups.chunk_tokens,
                        blends=config.blend == "on",
                    )  # fmt: skip

                return WorkerSide(
                    vllm_config, kv_cache_config, kv_caches, self._link, config, groups,
                    fronts if "on" in (config.meet, config.blend) else None,
                )  # fmt: skip

            self._make_worker = make

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is lost is a future miss, nothing more."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Heads before tokens where heads are shared, so that some of them are a run of bytes."""
        transfer, model = vllm_config.kv_transfer_config, vllm_config.model_config
        config = load_config(overrides=transfer.kv_connector_extra_config)
        return "LBHNC" if "ranks" in config.share and not model.use_mla else None

    # scheduler

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        hellos = {rank: hello for rank, hello in metadata.items() if isinstance(hello, WorkerHello)}
        if self._scheduler is not None:
            self._scheduler.introduce(hellos)

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self._scheduler is None:
            return StepMetadata()
        return self._scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.update_connector_output(connector_output)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        return False, self._scheduler.request_finished(request, block_ids)

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[Any, int]:
        if self._scheduler is None:
            return {}
        return self._scheduler.hit_sources(request, num_external_tokens)

    def take_events(self) -> Iterable[Any]:
        if self._events is None or self._scheduler is None:
            return ()
        return (*self._events.take(), *self._scheduler.blending.withdraw())

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset_cache() if self._scheduler is not None else None

    # worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if self._make_worker is None:
            return
        try:
            self._worker = self._make_worker(kv_caches)
        except KVStrataError as error:
            self._problem = str(error)
            self._link.close()

    def unregister_kv_caches(self) -> None:
        """vLLM 0.33 is about to unmap its blocks: the engine falls asleep."""
        if self._worker is not None:
            self._worker.drain()

    def restore_kv_caches(self, *_: Any) -> None:
        """vLLM 0.33 has mapped its blocks again, at the same addresses: there is nothing to do."""

    @classmethod
    def supports_sleep_mode(cls, *_: Any) -> bool:
        """vLLM 0.33 may unmap its blocks, as it says by `unregister_kv_caches`."""
        return True

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return (
            self._worker.hello() if self._worker is not None else WorkerHello(problem=self._problem)
        )

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None:
            assert isinstance(kv_connector_metadata, StepMetadata)
            self._worker.before_step(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            assert isinstance(connector_metadata, StepMetadata)
            self._worker.bind(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.load_sync()

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.load_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Stores read whole chunks after the step, see `wait_for_save`."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.after_forward()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        loaded, failed = self._worker.loads_ended()
        return KVConnectorTransferResults(finished_recving=loaded, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.invalid_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker.report() if self._worker is not None else None

    # metrics, on either side and where vLLM serves

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        side = self._scheduler or self._worker
        return side.tally.take() if side is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        return ConnectorStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ConnectorPromMetrics:
        return ConnectorPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()


def _log_as_vllm_does(level: str) -> None:
    """vLLM configures its own logger only; ours would print warnings and keep the rest quiet."""
    ours = logging.getLogger("kvstrata")
    if not ours.hasHandlers():
        for handler in logging.getLogger("vllm").handlers:
            ours.addHandler(handler)
        ours.setLevel(level.upper())


def _greet(transfer: Any, reason: str) -> None:
    """Say once what an operator must know, and mend the failure policy."""
    if transfer.kv_load_failure_policy != "recompute":
        # vLLM's default would fail requests over a cache that can only make them faster.
        transfer.kv_load_failure_policy = "recompute"
        logger.warning("KVStrata set kv_load_failure_policy to 'recompute'; it was 'fail'")
    if vllm.__version__ not in TESTED_VERSIONS:
        logger.warning(
            "KVStrata was tested with vLLM %s, not with %s; its self-test at start decides whether "
            "the KV's bytes are understood", ", ".join(TESTED_VERSIONS), vllm.__version__,
        )  # fmt: skip
    if reason:
        logger.warning("KVStrata leaves this engine's KV uncached: %s", reason)


def _refuse_reference_latents(vllm_config: Any, kv_cache_config: Any) -> None:
    """vLLM's reference kernels for latents on a CPU do not go on behind KV that is there.

    vLLM switches its own prefix cache off for them.

    Raises:
        Incompatible: the engine uses them.
    """
    if (
        vllm_config.device_config.device_type == "cpu"
        and not vllm_config.scheduler_config.enable_chunked_prefill
        and any(type(group.kv_cache_spec) is MLAAttentionSpec
                for group in kv_cache_config.kv_cache_groups)
    ):  # fmt: skip
        raise Incompatible(
            "its kernels for latent attention compute a prompt from the beginning only (vLLM's "
            "reference on a CPU without AMX)"
        )


def _say_stride(groups: Groups, most_tokens: int) -> None:
    """How far apart states are kept: vLLM leaves one where a step's tokens end."""
    if groups.stateful:
        chunk = groups.chunk_tokens
        logger.info(
            "KVStrata keeps a recurrent state every %d tokens of a prompt that is computed alone "
            "(max_num_batched_tokens %d, in chunks of %d), and at its last whole chunk",
            max(chunk, most_tokens // chunk * chunk), most_tokens, chunk,
        )  # fmt: skip
