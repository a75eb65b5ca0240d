"""Which of vLLM's KV other engines may load, and theirs vLLM, where ``share`` has ``engines``.

What is shared has a namespace that names no engine, and the keys of pages. What is not shared lies
in the engine's own namespace, as without the option: so do requests with an adapter or with media.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstrata.config import Config
from kvstrata.connectors.identity import checkpoint_folder, shared_namespace
from kvstrata.connectors.vllm.groups import Groups
from kvstrata.errors import Incompatible
from kvstrata.keys import Namespace


def refuse_alone(vllm_config: Any, groups: Groups) -> None:
    """What its configuration and its groups alone say of an engine.

    Raises:
        Incompatible: it shares with no other engine; the message says why.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        raise Incompatible("it drafts tokens, and engines keep what drafts differently")
    if not groups.prefix_only or groups.more:
        raise Incompatible("not all of its layers are full attention of one shape")
    if groups.each[0].replicated:
        raise Incompatible("engines may keep the parts of a latent in different orders")
    if parallel.prefill_context_parallel_size * parallel.decode_context_parallel_size > 1:
        raise Incompatible("its prompts are cut among ranks (context parallelism)")
    if parallel.pipeline_parallel_size > 1:
        raise Incompatible("its layers are on several stages of a pipeline")
    if any((model.hf_overrides, model.hf_config_path, model.quantization_config)):
        raise Incompatible("its configuration is not the checkpoint's alone")
    if any((model.model_weights, model.model_class_overrides)):
        raise Incompatible("its weights or its code are not the checkpoint's alone")


def shares(config: Config, vllm_config: Any, groups: Groups) -> bool:
    """Whether an engine is to share with others, and may as far as `refuse_alone` knows."""
    if "engines" not in config.share:
        return False
    try:
        refuse_alone(vllm_config, groups)
    except Incompatible:
        return False
    return True


def engines_namespace(
    vllm_config: Any,
    groups: Groups,
    layouts: Sequence[str],
    weights: str,
    tenant: str,
) -> Namespace:
    """The namespace that an engine shares with others.

    Args:
        vllm_config: the engine's configuration.
        groups: its layer groups.
        layouts: of each rank.
        weights: their identity.
        tenant: as configured.
    Raises:
        Incompatible: it shares with none; the message says why.
    """
    refuse_alone(vllm_config, groups)
    model, cache = vllm_config.model_config, vllm_config.cache_config
    folder = checkpoint_folder(model.model, getattr(model.hf_config, "_commit_hash", None))
    if model.config_format not in ("auto", "hf"):
        raise Incompatible(f"its configuration is in the format {model.config_format!r}")
    if model.config_format == "auto" and Path(folder, "params.json").exists():
        raise Incompatible("its checkpoint has two configurations; set --config-format hf")
    if len(set(layouts)) > 1:
        raise Incompatible("its ranks keep different KV")
    dtype = str(model.dtype).removeprefix("torch.")
    kv_dtype = dtype if cache.cache_dtype == "auto" else str(cache.cache_dtype)
    return shared_namespace(
        folder,
        weights,
        dtype,
        kv_dtype,
        model.max_model_len,
        layouts[0],
        groups.chunk_tokens,
        vllm_config.parallel_config.tensor_parallel_size,
        tenant=tenant,
        quantization=model.quantization or "",
    )


def may_share(request: Any) -> bool:
    """Whether a request's KV is the model's alone, named by its tokens alone."""
    return request.lora_request is None and not request.mm_features
