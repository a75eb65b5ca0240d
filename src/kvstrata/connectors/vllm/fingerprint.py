"""Which namespace a request's KV belongs to: everything that decides what the bytes mean."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any

from blake3 import blake3

from kvstrata.connectors.identity import cache_file, found, from_anywhere, succeeded
from kvstrata.connectors.vllm.engines import engines_namespace, may_share
from kvstrata.connectors.vllm.groups import Groups
from kvstrata.errors import ConfigError, Incompatible
from kvstrata.identity import adapter_identity, model_fingerprint, weights_identity
from kvstrata.keys import Namespace
from kvstrata.wire.namespaces import MAX_DETAIL_CHARS, Described

logger = logging.getLogger(__name__)


class Namespaces:
    """The engine's namespace and those of its adapters, found out in the background.

    Args:
        vllm_config: the engine's configuration.
        chunk_tokens: tokens of a chunk.
        tenant: as configured.
    """

    def __init__(self, vllm_config: Any, chunk_tokens: int, tenant: str) -> None:
        self._vllm_config = vllm_config
        self._chunk_tokens = chunk_tokens
        self._tenant = tenant
        self._hashing = ThreadPoolExecutor(1, "kvstrata-identity")
        self._engine: Future[Namespace] | None = None
        self._shared: Future[Namespace | None] | None = None
        self._weights: Future[str] | None = None
        self._adapters: dict[tuple[int, str], Future[str]] = {}
        self._generation = ""

    def identify(self, layout: str, wait_s: float, slices: int = 0) -> None:
        """Begin to find out the engine's namespace, and wait for it a little.

        Args:
            layout: the logical layout of the KV of all ranks, in one canonical text.
            slices: as of `engine_namespace`.

        Raises:
            ConfigError: the weights cannot be identified, so nothing may be cached.
        """
        # One thread, one after the other: who knows the namespace knows the weights.
        self._weights = self._hashing.submit(_weights, self._vllm_config)
        self._engine = self._hashing.submit(
            engine_namespace, self._vllm_config, layout, self._chunk_tokens, self._tenant, slices
        )
        try:
            self._engine.result(wait_s)
        except FutureTimeout:
            logger.warning("KVStrata: still hashing the weights; nothing is cached until then")

    def share(self, groups: Groups, layouts: Sequence[str]) -> None:
        """Have other engines load what this one stores, and this one theirs, where that can be.

        Before `identify`, so that what this finds out is known as soon as that is.

        Args:
            groups: the engine's layer groups.
            layouts: the logical layout of each rank's layers.
        """
        self._shared = self._hashing.submit(self._identify_shared, groups, layouts)

    def _identify_shared(self, groups: Groups, layouts: Sequence[str]) -> Namespace | None:
        try:
            weights = _weights(self._vllm_config)
            return engines_namespace(self._vllm_config, groups, layouts, weights, self._tenant)
        except Incompatible as error:
            logger.warning("KVStrata shares no KV with other engines: %s", error)
            return None

    def of(self, request: Any) -> bytes | None:
        """The digest of a request's namespace; raises and is None as `parts_of`."""
        parts = self.parts_of(request)
        return None if parts is None else parts.digest()

    def parts_of(self, request: Any) -> Namespace | None:
        """The namespace of a request's KV; None while its adapter is being hashed.

        Raises:
            ConfigError: the weights are still being hashed, or an identity cannot be had.
        """
        if self._engine is None or not self._engine.done():
            raise ConfigError("model", "its weights are still being hashed")
        namespace = found(self._engine, "model")
        if self._shared is not None and may_share(request):
            namespace = found(self._shared, "model") or namespace
        if request.lora_request is not None:
            # The number too: what is loaded anew from an old path may be something new.
            path, number = request.lora_request.lora_path, request.lora_request.lora_int_id
            adapter = self._adapters.get((number, path))
            if adapter is None:
                adapter = self._hashing.submit(adapter_identity, path, cache_file())
                self._adapters[number, path] = adapter
            if not adapter.done():
                return None
            namespace = replace(namespace, adapter=found(adapter, "adapter"))
        return replace(namespace, model=namespace.model + self._generation)

    def describe(self, namespace: Namespace) -> Described | None:
        """One of this engine's namespaces, and what its model's fingerprint is made of.

        None while the weights' identity is not at hand.
        """
        if self._weights is None or not succeeded(self._weights):
            return None
        effective = _effective(self._vllm_config)
        configuration = json.dumps(effective.pop("model"), sort_keys=True).encode()
        if not namespace.pages:  # what is shared is made of the checkpoint's own
            effective["configuration"] = blake3(configuration).hexdigest()[:16]
        model = {
            "name": str(self._vllm_config.model_config.model),
            "weights": self._weights.result(),
            **effective,
            "reset": self._generation or "no",
        }
        return Described(namespace, {k: str(v)[-MAX_DETAIL_CHARS:] for k, v in model.items()})

    def weights_of(self, request: Any) -> str:
        """Identity of the weights that make a request's KV; "" unless they are those on disk."""
        weights = self._weights
        if self._generation or request.lora_request is not None or weights is None:
            return ""
        return weights.result() if succeeded(weights) else ""

    def when_weighed(self, tell: Callable[[str], None]) -> None:
        """Call back with the weights' identity once it is known; from another thread, perhaps."""
        if self._weights is not None:
            self._weights.add_done_callback(
                lambda found: tell(found.result()) if succeeded(found) else None
            )

    def renew(self) -> None:
        """Begin a new namespace: the weights may have changed where they are."""
        self._generation = os.urandom(16).hex()

    def close(self) -> None:
        """Hash no more. Repeatable."""
        self._hashing.shutdown(wait=False, cancel_futures=True)


def engine_namespace(
    vllm_config: Any, layout: str, chunk_tokens: int, tenant: str, slices: int = 0
) -> Namespace:
    """The namespace of an engine without an adapter; reads the weights, so it may take seconds.

    Args:
        vllm_config: the engine's configuration.
        layout: the logical layout of the KV of all ranks, in one canonical text.
        chunk_tokens: tokens of a chunk.
        tenant: as configured.
        slices: into how many a layer's KV heads are cut for every number of ranks; 0: they are not.

    Raises:
        ConfigError: the weights cannot be identified, so nothing may be cached.
    """
    parallel = vllm_config.parallel_config
    return Namespace(
        model=model_fingerprint(_effective(vllm_config), _weights(vllm_config)),
        layout=layout,
        chunk_tokens=chunk_tokens,
        tensor_parallel=1 if slices else parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        context_parallel=parallel.prefill_context_parallel_size
        * parallel.decode_context_parallel_size,
        tenant=tenant,
        slices=slices,
    )


def _effective(vllm_config: Any) -> dict[str, Any]:
    """What the model computes with, beside its weights."""
    model = vllm_config.model_config
    drafting = {}
    if (draft := _draft(vllm_config)) is not None:
        weights = _weights_of(draft, vllm_config.load_config)
        drafting = {"draft": model_fingerprint(_described(draft), weights)}
    return {
        **drafting,
        "model": _described(model),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        # LongRoPE picks its factors by it, so keys of one token differ between two lengths
        "max_model_len": model.max_model_len,
    }


def _described(model: Any) -> Any:
    """A model's configuration, without what does not shape what it computes."""
    described = model.hf_config.to_dict()
    described.pop("_name_or_path", None)
    described.pop("transformers_version", None)
    # dtypes and enums have one text form each; nothing else in a configuration is an object
    return from_anywhere(json.loads(json.dumps(described, default=str)))


def _draft(vllm_config: Any) -> Any | None:
    """The model that drafts, whose KV lies beside the target's; None if it is no other one."""
    drafts = vllm_config.speculative_config
    model = None if drafts is None else drafts.draft_model_config
    return None if model is None or model.model == vllm_config.model_config.model else model


def _weights(vllm_config: Any) -> str:
    return _weights_of(vllm_config.model_config, vllm_config.load_config)


def _weights_of(model: Any, load_config: Any) -> str:
    if load_config.load_format == "dummy":
        # Random weights: nobody else has them, not even this engine after a restart.
        return f"dummy:{os.urandom(16).hex()}"
    if os.path.exists(model.model):
        return weights_identity(model.model, cache_file())
    commit = getattr(model.hf_config, "_commit_hash", None)
    if not commit:
        raise ConfigError(
            "model",
            f"{model.model!r} is no local path and its hub revision is unknown; name a --revision",
        )
    return f"hub:{model.model}@{commit}"
