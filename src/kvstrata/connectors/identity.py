"""What the engines' connectors have in common where they find out whose KV it is."""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from kvstrata.config import Config
from kvstrata.errors import ConfigError, Incompatible
from kvstrata.identity import model_fingerprint
from kvstrata.keys import Namespace
from kvstrata.layout import ITEM_BYTES
from kvstrata.quality.bound import Bound
from kvstrata.quality.choice import trouble

logger = logging.getLogger(__name__)

T = TypeVar("T")


def cache_file() -> Path:
    """Where hashes of weight files are remembered."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvstrata" / "weights"


def succeeded(future: Future[Any]) -> bool:
    """Whether it has a result: not if it still runs, failed, or was cancelled by the end."""
    return future.done() and not future.cancelled() and future.exception() is None


def found(future: Future[T], what: str) -> T:
    """What was found out; whatever went wrong means that nothing may be cached."""
    error = future.exception()
    if error is not None:
        raise ConfigError(what, f"its identity cannot be had: {error}") from error
    return future.result()


def from_anywhere(described: Any) -> Any:
    """The same wherever configurations inside it were read from: EAGLE's has the head's in it."""
    if not isinstance(described, dict):
        return described
    return {
        name: "" if name == "_name_or_path" else from_anywhere(value)
        for name, value in described.items()
    }


def explain_auto(config: Config, model: str, weights: str) -> None:
    """Say at the start, and where the operator looks, why ``codec = auto`` stays lossless."""
    names = [part.name for part in config.tiers if part.codec == "auto"]
    if names and (why := trouble(weights, Bound.parse(config.quality), model)):
        logger.error("KVStrata: %s.codec is auto, but stores losslessly: %s", names[0], why)


def shared_layout(
    num_layers: int, states: int, num_kv_heads: int, head_dim: int, dtype: str
) -> str:
    """The layout of a rank's KV as every engine writes it that shares, see `shared_namespace`.

    Args:
        num_layers, num_kv_heads, head_dim: of one rank.
        states: 2 for key and value.
        dtype: of its elements, "bfloat16" for instance.
    """
    return f"full {num_layers} layers, {states} states, {num_kv_heads} heads of {head_dim}, {dtype}"


def shared_namespace(
    folder: str,
    weights: str,
    dtype: str,
    kv_dtype: str,
    max_tokens: int,
    layout: str,
    page_tokens: int,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    tenant: str = "",
    *,
    quantization: str = "",
) -> Namespace:
    """The namespace of a model that all engines share which compute it alike.

    Engines read a configuration with libraries of their own, of different versions. So this one is
    made of the checkpoint's own ``config.json``, and what an engine changes of that is not shared:
    whoever calls this has made sure that there are no overrides, that the model drafts for itself
    alone, and that all of its layers are full attention with keys and values for each head.

    Args:
        folder: that holds the checkpoint, see `checkpoint_folder`.
        weights: `kvstrata.identity.weights_identity` of the folder; of a hub's model that is loaded
            by its name ``hub:<repository>@<commit>``.
        dtype: that the model computes in, "bfloat16" for instance; never "auto".
        kv_dtype: of the KV's elements; never "auto".
        max_tokens: the longest context: factors of some rotary embeddings depend on it.
        layout: `shared_layout` of one rank; all ranks are alike.
        page_tokens: tokens of a chunk, or a page.
        tensor_parallel, pipeline_parallel: sizes of the engine.
        tenant: as configured.
        quantization: of the weights, as the engine calls it; "" if there is none.
    Raises:
        Incompatible: it cannot be shared; the message says why.
    """
    if weights.startswith("dummy:"):
        raise Incompatible("its weights are random")
    if pipeline_parallel > 1:
        raise Incompatible(f"its layers are on {pipeline_parallel} stages of a pipeline")
    if ITEM_BYTES.get(kv_dtype, 1) < 2:
        raise Incompatible(f"its KV is {kv_dtype}, with scales that each engine has of its own")
    described = _described_in(folder)
    if quantization and "quantization_config" not in described:
        raise Incompatible(
            f"its weights are quantized by the engine ({quantization}), not by its config.json"
        )
    effective = {
        "shared by": "engines",
        "model": described,
        "dtype": dtype,
        "kv_cache_dtype": kv_dtype,
        "max_model_len": max_tokens,
    }
    return Namespace(
        model=model_fingerprint(effective, weights),
        layout=layout,
        chunk_tokens=page_tokens,
        tensor_parallel=tensor_parallel,
        tenant=tenant,
        pages=True,
    )


def checkpoint_folder(model: str, commit: str | None = None) -> str:
    """The folder on this machine that a model is loaded from: itself, or a hub's snapshot of it.

    Args:
        model: a folder, or the name of a hub's repository.
        commit: of the repository, as the engine found it.
    Raises:
        Incompatible: it has none with a ``config.json``.
    """
    if os.path.isdir(model):
        return model
    if not os.path.exists(model) and commit:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=commit)
        if isinstance(found, str):
            return os.path.dirname(found)
    raise Incompatible(f"{model!r} has no folder with a config.json on this machine")


def _described_in(folder: str) -> dict[str, Any]:
    """What a checkpoint's ``config.json`` says of the model, wherever and whenever it was saved."""
    file = Path(folder, "config.json")
    try:
        described = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise Incompatible(f"{file} cannot be read: {error}") from error
    if not isinstance(described, dict):
        raise Incompatible(f"{file} describes no model")
    described.pop("transformers_version", None)
    kept: dict[str, Any] = from_anywhere(described)
    kept.pop("_name_or_path", None)
    return kept
