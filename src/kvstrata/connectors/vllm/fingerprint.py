"""Which namespace a vLLM engine's KV belongs to: everything that decides what the bytes mean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvstrata.errors import ConfigError
from kvstrata.identity import model_fingerprint, weights_identity
from kvstrata.keys import Namespace


def cache_file() -> Path:
    """Where hashes of weight files are remembered."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvstrata" / "weights"


def engine_namespace(
    vllm_config: Any, layout: str, chunk_tokens: int, tenant: str
) -> Namespace:
    """The namespace of an engine without an adapter. Reads the weights once, so it may take seconds.

    Args:
        vllm_config: the engine's configuration.
        layout: the logical layout of one rank's KV, in one canonical text.
        chunk_tokens: tokens of a chunk.
        tenant: as configured.

    Raises:
        ConfigError: the weights cannot be identified, so nothing may be cached.
    """
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    described = model.hf_config.to_dict()
    described.pop("_name_or_path", None)
    described.pop("transformers_version", None)
    effective = {
        # dtypes and enums have one text form each; nothing else in a configuration is an object
        "model": json.loads(json.dumps(described, default=str)),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "max_model_len": model.max_model_len,
    }
    return Namespace(
        model=model_fingerprint(effective, _weights(vllm_config)),
        layout=layout,
        chunk_tokens=chunk_tokens,
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        context_parallel=parallel.prefill_context_parallel_size
        * parallel.decode_context_parallel_size,
        tenant=tenant,
    )


def _weights(vllm_config: Any) -> str:
    model = vllm_config.model_config
    if vllm_config.load_config.load_format == "dummy":
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
